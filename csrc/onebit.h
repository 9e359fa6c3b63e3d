/* onebit.h - the only public C header: every operation on ternary linear layers.
 *
 * No Python, no torch, no globals but the thread pool and the kernel table.  Notation: M tokens, N outputs, K inputs,
 * W = s * T with T (N,K) in {-1,0,+1}.  The arithmetic is stated to the bit in csrc/README.md; every function here
 * gives the same bits on every instruction set and thread count.
 *
 * Contract shared by all functions: sizes may be 0; arrays are C-contiguous; inputs and outputs do not overlap;
 * pointers need the natural alignment of their type only, but `packed` must be 64-byte aligned where said.
 * A function that returns anything but OB_OK has written nothing. */
#ifndef ONEBIT_H
#define ONEBIT_H

#include <stddef.h>
#include <stdint.h>

/* ------------------------------------------------------------------ status */
typedef enum ob_status {
    OB_OK = 0,
    OB_NO_MEMORY,     /* an allocation failed */
    OB_OVERFLOW,      /* a size does not fit (see OB_MAX_K) */
    OB_INVALID,       /* an argument outside its domain */
    OB_RESERVED_CODE, /* bits that stand for no ternary value */
    OB_UNSUPPORTED    /* this build or machine cannot do it */
} ob_status;

const char *ob_status_text(ob_status status); /* one static English phrase */

/* ------------------------------------------------------------------ kinds */
typedef enum ob_dtype { OB_F32 = 0, OB_BF16 = 1 } ob_dtype; /* bf16 = upper half of a float32 */

#define OB_MAX_K 16909320u /* K * 127 fits int32 */
#define OB_TOKENS_PER_VOTE \
    65536u /* M * 127 * 127 fits int32; longer batches are cut into micro-batches of this */

/* Packings: one name per line of formats/formats.def.  Kernels read two of them: tile16, and trits5 forward only. */
typedef enum ob_format_id {
#define OB_FORMAT(name) OB_FORMAT_##name,
#include "formats/formats.def"
#undef OB_FORMAT
    OB_FORMAT_COUNT
} ob_format_id;

/* Flip rules: one name per line of flip_rules/rules.def, numbered in its order, which therefore only grows at its end. */
typedef enum ob_rule {
#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) OB_RULE_##name,
#include "flip_rules/rules.def"
#undef OB_RULE
    OB_RULE_COUNT
} ob_rule;

const char *ob_rule_name(ob_rule rule);
int ob_rule_residual_bits(ob_rule rule);
int ob_rule_momentum_bits(ob_rule rule); /* 0: no momentum plane */
int ob_rule_units(ob_rule rule);         /* residual units per cell */
float ob_rule_dead_zone(ob_rule rule);   /* of its votes, in units of u */
/* The default of OB_CTL_BETA1: .7 with a momentum plane. Codes that a momentum of .9 moves go on for ten steps after the
 * gradient has turned, which costs more than the smoothing gains (docs/learning.md). */
double ob_rule_beta1(ob_rule rule);
int ob_rule_moves_in_vote(
    ob_rule rule); /* 1: ob_vote writes planes->codes, which must be given without a vote plane */
/* Bytes of a row of the residual and of the momentum plane for K inputs. */
size_t ob_rule_residual_row_bytes(ob_rule rule, size_t k);
size_t ob_rule_momentum_row_bytes(ob_rule rule, size_t k);

/* ------------------------------------------------------------------ control
 * What a layer's flip rule reads and remembers besides its planes: float64[OB_CONTROL_LEN], integers exact below 2^53.
 * An array, so that it can live in an optimizer's state and reach compiled graphs as a tensor. */
enum ob_control {
    OB_CTL_SEED = 0, /* run seed, integer in [0, 2^53) */
    OB_CTL_LAYER,    /* layer id, differs between layers of equal shape */
    OB_CTL_STEP, /* steps this layer took part in; 0: factors not measured yet, no votes are cast */
    OB_CTL_MICRO,         /* micro-batches seen since the last step */
    OB_CTL_NONFINITE,     /* calls that met a non-finite gradient since the last step */
    OB_CTL_ETA,           /* learning rate now, in cells per step */
    OB_CTL_ETA_PEAK,      /* largest learning rate seen (the guard's reference) */
    OB_CTL_GUARD,         /* guard factor k in [1e-3, 1] */
    OB_CTL_CAP,           /* flip-rate cap of the guard, share of codes per step; 0: no guard */
    OB_CTL_CLIP,          /* a vote u is clipped to +- this */
    OB_CTL_BETA1,         /* decay of the momentum plane and of the scale's first moment */
    OB_CTL_BETA2,         /* decay of the factors and of the scale's second moment */
    OB_CTL_GRAD_SCALE,    /* loss scale contained in dy (1 without a GradScaler) */
    OB_CTL_SKETCH_ENERGY, /* sum over micro-batches of |z|^2 */
    OB_CTL_MOVED,         /* codes moved by the last step */
    OB_CTL_SCALE_INIT, /* mean scale when the optimizer was attached: the scale's lr is relative to it */
    OB_CTL_BETA1_POWER, /* beta1^t of the scale's Adam, running product, starts at 1 */
    OB_CTL_BETA2_POWER, /* beta2^t likewise */
    OB_CTL_STRIPES,     /* as in ob_planes, which rules; kept here for those who store planes */
    OB_CTL_STRIPE,      /* in [0, STRIPES); keys the random stream */
    OB_CTL_VOTE_MOVED,  /* codes moved by votes since the last step */
    OB_CTL_RULE,        /* whose planes these are: line of flip_rules/rules.def, counted from 0 */
    OB_CONTROL_LEN
};
/* While the guard is on, a larger eta counts as this: the flips that the guard measures come too late for it. */
#define OB_ETA_LIMIT 0.06f

/* ------------------------------------------------------------------ views */
typedef struct ob_weights {
    const uint8_t *packed; /* tile16 (ceil(N/64), ceil(K/16), 4, 16, 4), 64-byte aligned */
    size_t n, k;
    const float *scale;   /* (scale_len,) */
    size_t scale_len;     /* 1 or n */
    const float *bias;    /* (n,) or NULL */
    ob_format_id packing; /* of packed; trits5 (.., ceil(K/20), 4, 16, 4): forward only */
} ob_weights;

typedef struct
    ob_planes { /* training state of one layer; all arrays are the caller's; N' = ob_active_rows */
    ob_rule rule;
    size_t stripes, stripe; /* > 1: only rows n % stripes == stripe own planes (block-cyclic) */
    uint8_t *codes;    /* = ob_weights.packed, for rules that move codes in votes; NULL otherwise */
    void *residual;    /* (N', ob_rule_residual_row_bytes), NULL if that is 0 */
    uint8_t *momentum; /* (N', ob_rule_momentum_row_bytes), NULL if that is 0 */
    uint16_t *momentum_scale; /* (N', ceil(K/64)) bf16, or NULL */
    float *row_factor;        /* (N',) R: running mean over steps of mean_k g^2 */
    float *col_factor;        /* (K,) C: running mean over steps of mean_n g^2 */
    float *row_sum;           /* (N',) this step: sum over micro-batches of mean_k g^2 */
    float *col_sum;           /* (K,) likewise mean_n g^2 */
    float *sketch;            /* (N',) z: sum over micro-batches of sum_k t_k g_nk, t = +-1 */
    double *control;          /* (OB_CONTROL_LEN,) */
    int16_t *votes; /* (N', K) sum of this step's votes, zero between steps; NULL: none is kept */
} ob_planes;

/* With a vote plane every rule works alike: ob_vote adds u, clamped to +-OB_VOTE_LIMIT, to it in units of
 * 1 / OB_VOTE_UNITS and moves nothing else; ob_flip casts the sum as one vote, takes the factors of the step from it
 * and leaves it zero.  So micro-batches are one batch, up to that grid. */
#define OB_VOTE_UNITS 1024
#define OB_VOTE_LIMIT 31

/* Rows that own planes: N, or ceil((N - stripe) / stripes) when training is block-cyclic. */
size_t ob_active_rows(size_t n, size_t stripes, size_t stripe);

/* ------------------------------------------------------------------ linear
 * Padded length of an int8 activation row: 16 * ceil(K/16); the padding holds zeros. */
size_t ob_padded_k(size_t k);

/* y (M,N) = (xq . T^T) * (sx * s_n) + b_n;  x, y (M,K), (M,N) of type dt.
 * Per token absmax: a = max(|x|_inf, 1e-5), xq = clamp(rint(x * (127/a)), +-127), sx = a/127.
 * xq (M, ob_padded_k(K)) and sx (M,) are written for the backward; pass NULL for both to keep nothing.
 * A token with a non-finite entry: xq = 0, sx = NaN, y = NaN.  The same bits from both packings; the other functions
 * below refuse trits5 with OB_UNSUPPORTED. */
ob_status ob_linear_forward(const ob_weights *w, size_t m, ob_dtype dt, const void *x, void *y,
                            int8_t *xq, float *sx);

/* dx (M,K) = (dyq . T) * d;  g = dy * s_n per token, d = |g|_inf / 127, dyq = SR(g * (127/|g|_inf)), stream dX at
 * control's (seed, layer, step, micro).  |g|_inf < 2^-100: zeros.  A non-finite token: NaN, counted in *nonfinite.
 * control is read only. */
ob_status ob_linear_backward_input(const ob_weights *w, size_t m, ob_dtype dt, const void *dy,
                                   void *dx, const double *control, size_t *nonfinite);

/* The weight side of the backward: hq = SR(dy * sx) per output column over the tokens, acc = hq^T . xq in registers,
 * never stored; from each tile the votes (planes->votes, else ->residual or ->momentum), row_sum, col_sum, sketch, and
 *   ds[n or 0] += sum_k T_nk dW_nk     db[n] += sum_m dy_mn        (NULL: not wanted)
 * planes NULL: no votes and no sums, `control` (required then) gives the random stream.  With planes, their control is
 * used, and MICRO grows by ceil(M / OB_TOKENS_PER_VOTE).  If STEP is 0 the layer only measures.
 * A non-finite dy * sx anywhere in the call: *nonfinite = 1, ds and db (if wanted) become NaN, nothing else changes
 * except control's NONFINITE and MICRO. */
ob_status ob_vote(const ob_weights *w, size_t m, ob_dtype dt, const void *dy, const int8_t *xq,
                  const float *sx, ob_planes *planes, const double *control, float *ds, float *db,
                  size_t *nonfinite);

/* One optimizer step of a layer's codes: held votes into the rule's planes, momentum into the residual (if the rule has
 * one), residual into the codes, factors from the sums, guard, counters; sums are cleared.  MICRO = 0 (layer unused):
 * nothing changes.
 * packed as in ob_weights, written.  *moved: codes that changed. */
ob_status ob_flip(size_t n, size_t k, uint8_t *packed, ob_planes *planes, uint64_t *moved);

/* Forget this step's sums without moving a code (a GradScaler skipped the step).  Votes stay in the residual; those in
 * a vote plane are forgotten too. */
void ob_discard(size_t n, size_t k, ob_planes *planes);

/* A residual as training starts: zero, but uniform within .3 cell below 8 bits, so that
 * the coarse grid does not wait in step (stream INIT, row n, column k), and 85 T for `byte`, which needs packed. */
void ob_start_residual(size_t n, size_t k, const uint8_t *packed, ob_planes *planes);

/* Weights whose residual waits at a bound for votes of the other sign (16, 8 bits: at or beyond half a cell). */
uint64_t ob_saturated(size_t n, size_t k, const uint8_t *packed, const ob_planes *planes);

/* Adam on the scale (length len): lr is relative to control's SCALE_INIT; s >= 1e-8; then s = 1/(1/s) in float32, so
 * that the stored inverse is exact both ways.  grad is divided by GRAD_SCALE. */
ob_status ob_scale_step(size_t len, float *scale, const float *grad, float *exp_avg,
                        float *exp_avg_sq, double lr, double *control);

/* absmean: s = max(mean |w|, 1e-5), T = clamp(rint(w / s), +-1), half to even (BitNet b1.58, arXiv 2402.17764).
 * w (N,K) of type dt -> packed tile16 and *scale.  A non-finite w: OB_INVALID. */
ob_status ob_absmean(size_t n, size_t k, ob_dtype dt, const void *w, uint8_t *packed, float *scale);

/* Starting codes: -1, 0, +1 with equal shares, stream INIT of the seed (layer, step, micro 0) at row n, column k:
 * code = 3 * draw >> 32. */
void ob_random_codes(size_t n, size_t k, uint64_t seed, uint8_t *packed);

#define OB_MAX_RANKS 4096

/* mean (share,) of what `ranks` processes hold in parts (ranks, share), int8 or int16 by `bytes`: floor((sum + j) / ranks),
 * j = floor(ranks * r), r as of stochastic rounding under the stream COMBINE, micro 0, with no rank in its key.  parts are the entries first ..
 * first + share - 1 of a plane with rows of `columns`; row i of it is output STRIPE + STRIPES * i. */
ob_status ob_average_residuals(size_t ranks, size_t share, int bytes, const void *parts,
                               size_t first, size_t columns, const double *control, void *mean);

/* ------------------------------------------------------------------ formats */
const char *ob_format_name(ob_format_id id);
ob_status ob_format_bytes(ob_format_id id, size_t n, size_t k,
                          size_t *bytes); /* OB_INVALID: shape not representable */
ob_status ob_pack(ob_format_id id, size_t n, size_t k, const int8_t *codes,
                  uint8_t *bytes); /* codes in -1,0,1 */
ob_status ob_unpack(ob_format_id id, size_t n, size_t k, const uint8_t *bytes,
                    int8_t *codes); /* codes (N,K) int8 */
ob_status ob_convert(ob_format_id from, ob_format_id to, size_t n, size_t k, const uint8_t *in,
                     uint8_t *out);
ob_status ob_validate(ob_format_id id, size_t n, size_t k,
                      const uint8_t *bytes); /* reserved codes, padding */

/* ------------------------------------------------------------------ reference: naive twins, same contracts */
ob_status ob_reference_linear_forward(const ob_weights *w, size_t m, ob_dtype dt, const void *x,
                                      void *y, int8_t *xq, float *sx);
ob_status ob_reference_linear_backward_input(const ob_weights *w, size_t m, ob_dtype dt,
                                             const void *dy, void *dx, const double *control,
                                             size_t *nonfinite);
ob_status ob_reference_vote(const ob_weights *w, size_t m, ob_dtype dt, const void *dy,
                            const int8_t *xq, const float *sx, ob_planes *planes,
                            const double *control, float *ds, float *db, size_t *nonfinite);
ob_status ob_reference_flip(size_t n, size_t k, uint8_t *packed, ob_planes *planes,
                            uint64_t *moved);
ob_status ob_reference_absmean(size_t n, size_t k, ob_dtype dt, const void *w, uint8_t *packed,
                               float *scale);
/* The dense dW (N,K) float64 that the votes of one micro-batch see: acc_nk * h_scale_n.  M <= OB_TOKENS_PER_VOTE.
 * The only N x K float in the project. */
ob_status ob_reference_weight_gradient(const ob_weights *w, size_t m, ob_dtype dt, const void *dy,
                                       const int8_t *xq, const float *sx, const double *control,
                                       double *dw);

/* ------------------------------------------------------------------ run time */
size_t ob_isa_count(void);         /* instruction sets compiled in, worst first */
const char *ob_isa_name(size_t i); /* "scalar", "avx2", ... */
int ob_isa_supported(size_t i);    /* can this machine run it */
size_t ob_isa_active(void);        /* index in use; ONEBIT_ISA forces it at first use */
ob_status ob_isa_force(size_t i);  /* for tests; OB_UNSUPPORTED if the machine lacks it */
const char *ob_isa_error(void);    /* NULL, or why ONEBIT_ISA could not be honoured */
void ob_isa_tiles(size_t i, size_t *forward_rows, size_t *input_rows, size_t *weight_rows);

size_t ob_num_threads(void);
ob_status ob_set_num_threads(size_t threads); /* 1..256; takes effect at the next call, for good */
/* Run on the threads of the OpenMP runtime at this path, which must be loaded (it has GOMP_parallel and
 * omp_get_max_threads), and on as many as it would use, unless another number was set: two sets of threads that wait
 * actively take the cores from each other.  NULL: own threads again.  So in children forked later; do not call it in the
 * child of a process that used that runtime, where libgomp waits for ever.  OB_UNSUPPORTED: no such runtime is loaded;
 * nothing changes. */
ob_status ob_share_threads(const char *openmp);

/* 64-byte aligned memory, the only malloc of the project.  Huge pages are advised for large blocks. */
void *ob_alloc(size_t bytes); /* NULL: out of memory */
void ob_free(void *block);
/* The same for a call's results: recycled, because the next call would fault fresh pages in again. */
void *ob_alloc_result(size_t bytes);
void ob_free_result(void *block);
void
ob_alloc_fail_after(int64_t calls); /* tests: the calls-th ob_alloc from now fails; -1: never */
size_t ob_alloc_live_bytes(void);   /* now */
size_t ob_alloc_peak_bytes(void);   /* since the last reset */
size_t ob_alloc_largest(void);      /* largest single block since the last reset */
void ob_alloc_reset_peak(void);

/* ------------------------------------------------------------------ machine limits
 * For the benchmark, on all threads: int8 multiply-adds from registers (how many were done; 0: unknown here), a plain read
 * of whole cache lines (returns their union), a plain read and write back of the same bytes. */
uint64_t ob_limit_multiply(size_t rounds);
uint64_t ob_limit_read(const void *data, size_t bytes);
void ob_limit_update(void *data, size_t bytes);

#endif
