/* kernel.h - what one instruction set offers: a table of row and tile kernels, filled once by kernels/all.tmpl.h.
 *
 * The macro-kernels (ops/) own blocking, threads, scratch and chunking; a kernel sees one row, one 64-column strip or
 * one register tile.  Integer kernels are exact; float kernels work on 16 virtual lanes and one fixed reduction tree,
 * so every table gives the same bits (csrc/README.md states them). */
#ifndef OB_KERNEL_H
#define OB_KERNEL_H

#include "../base/config.h"
#include "../base/rng.h"
#include "../formats/tile16.h"
#include "../formats/trits5.h"
#include "../onebit.h"

#define OB_STRIP 64       /* columns of every tile: outputs in forward, inputs in dX and dW */
#define OB_MAX_ROWS 64    /* no tile is higher */
#define OB_TINY 0x1p-100f /* gradients with a smaller absmax are zero */

typedef int32_t ob_acc[OB_STRIP]; /* one row of a tile */

OB_INLINE size_t
ob_dtype_bytes(ob_dtype dt)
{
    return dt == OB_F32 ? 4 : 2;
}

/* One strip of 64 input columns k0..k0+63 of the weight side of a layer's backward; constant over its tiles.
 * Rows i = 0.. are the outputs that own planes; row i is output row_first + row_stride * i (block-cyclic training). */
typedef struct ob_vote_strip {
    /* in */
    size_t columns; /* 1..64 columns that exist; acc is zero beyond */
    size_t tokens;  /* behind acc: |acc| <= 127^2 tokens */
    size_t strip;   /* index of this strip: k0 / 64 */
    uint8_t *codes; /* whole tile16 plane; written only by rules that move codes at vote time */
    size_t k_steps; /* ceil(K/16) */
    size_t row_first, row_stride;
    const float *g_scale;   /* (rows,) scale of hq per output * (weight scale / loss scale) */
    const float *a;         /* (rows,) vote coefficient of the row, finite as float(acc) * a is */
    const float *c;         /* (64,) vote coefficient of the column, finite */
    const uint32_t *sign;   /* (64,) sketch sign bits */
    const uint32_t *random; /* (rows,) the number of column 0 of a row, of the rule's stream */
    float step;             /* -units * eta * guard */
    float clip; /* of u; |step * clip| < 2^20, a dead zone aside, where u goes into a residual */
    /* momentum: m = beta1 * m + one_minus_beta1 * u; beta1 = 1 after the first micro-batch */
    float beta1, one_minus_beta1;
    int votes;                /* 0: measure only */
    int16_t *held;            /* (rows, K), for hold_tile */
    void *residual;           /* (rows, K) or blocks (rows, strips, ...), see the rule */
    uint8_t *momentum;        /* (rows, strips, ...) */
    uint16_t *momentum_scale; /* (rows, strips) */
    size_t k, strips;
    /* out */
    float *col_square; /* (64,) += g^2, sequential over the rows */
    float *row_square; /* (rows,) = sum over the strip of g^2 */
    float *row_sketch; /* (rows,) = sum over the strip of t * g */
    int64_t *row_code; /* (rows,) += sum over the strip of T * acc */
    uint64_t *moved;   /* += codes moved by votes */
} ob_vote_strip;

/* The votes that a row's vote plane holds, to be cast at once. */
typedef struct ob_cast_row {
    ob_vote_strip vote; /* of planes that have this row alone; the kernel sets strip and columns */
    size_t n;           /* this row's output */
    int16_t *held;      /* (K,) zero afterwards */
    float ratio;        /* R_n / mean R of the factors that the votes used */
    const float *col_factor; /* (strips, 64) C of those, zero beyond K */
    float *col_square;       /* (strips, 64) += u^2 * ratio */
    float *row_square;       /* = sum over k of u^2 * C_k */
} ob_cast_row;

typedef struct ob_flip_row {
    size_t k;
    void *residual;           /* this row's */
    uint8_t *momentum;        /* (strips, ...) or NULL */
    uint16_t *momentum_scale; /* (strips,) or NULL */
    uint32_t random;          /* the number of column 0, stream MOMENTUM_STEP */
    float step;               /* -units * eta * guard */
    uint8_t *packed;          /* tile16 plane */
    size_t k_steps, n;        /* n: this row's output */
} ob_flip_row;

typedef struct ob_kernels {
    const char *name;
    size_t forward_rows, input_rows,
        weight_rows;     /* tile heights of the three products, <= OB_MAX_ROWS */
    size_t panel_tokens; /* from here decode_forward_panel once beats decoding in every tile */
    /* At the end of a task that called a dot_*: gives back what they hold of the thread.  NULL: nothing. */
    void (*leave)(void);

    /* x (K,) -> q (ob_padded_k(K),) int8 zero padded, *scale, *sum of q.  Deterministic rounding, floor 1e-5. */
    void (*quantize_row)(ob_dtype dt, size_t k, const void *x, int8_t *q, float *scale,
                         int32_t *sum);
    /* g = dy (N,) * s_n (s_len 1 or N), SR; q (ob_padded_k(N),).  Returns 1 if the row is non-finite (q = 0, scale NaN). */
    int (*quantize_row_sr)(ob_dtype dt, size_t n, const void *dy, const float *s, size_t s_len,
                           uint32_t random, int8_t *q, float *scale, int32_t *sum);
    /* Columns 0..columns-1 of dy (M, ld): absmax[64] = max over m of the bits of |dy * sx_m|; sum[64] = sequential sum
     * of dy (float).  Entries beyond `columns` are 0. */
    void (*column_absmax)(ob_dtype dt, size_t m, size_t columns, const void *dy, size_t ld,
                          const float *sx, uint32_t *absmax, float *sum);
    /* q (columns, ldq) int8 with q[j][m] = SR(dy[m][j] * sx_m * inverse[j]), zero for m..ldq; sums[j] = sum of q[j].
     * random: the number of token 0 of each column; inverse[j] = 0 gives zeros. */
    void (*quantize_columns_sr)(ob_dtype dt, size_t m, size_t columns, const void *dy, size_t ld,
                                const float *sx, const float *inverse, const uint32_t *random,
                                int8_t *q, size_t ldq, int32_t *sums);

    /* w (rows, K), rows <= 8: sums[r] = sequential double sum of |w_r|. */
    void (*sum_rows)(ob_dtype dt, size_t rows, size_t k, const void *w, double *sums);
    /* w (K,): codes 2 where w > half, 0 where w < -half, else 1; 16 columns in a dword, 256 bytes from one to the next. */
    void (*ternarize_row)(ob_dtype dt, size_t k, const void *w, float half, uint8_t *packed);

    /* Strip `packed_strip` (k_steps, 4, 16, 4): acc[r][o] = sum_k T_ok x[r][k]; rows <= forward_rows. */
    void (*dot_forward)(size_t rows, size_t k_steps, const uint8_t *packed_strip, const int8_t *x,
                        size_t ldx, const int32_t *sum, ob_acc *acc);
    /* The same strip as a panel for dot_input, of 16 * k_steps rows: pays from some tokens on.  NULL: dot_forward's own
     * decoding is free. */
    void (*decode_forward_panel)(size_t k_steps, const uint8_t *packed_strip, uint8_t *panel);
    /* Strip (steps, 4, 16, 4) of trits5 -> strip (k_steps, 4, 16, 4) of tile16, steps = ceil(K/20); codes beyond 20 * steps
     * columns are 0, where x is 0 too. */
    void (*decode_trits)(size_t steps, size_t k_steps, const uint8_t *trits, uint8_t *packed_strip);
    /* Decode columns of strip j (up to 4 k-steps from 4j) of the whole plane into this ISA's panel of
     * ob_padded_k(N) * 64 bytes. */
    void (*decode_input_panel)(size_t n, size_t k_steps, const uint8_t *packed, size_t strip,
                               uint8_t *panel);
    /* acc[r][j] = sum_n T_nj q[r][n]; n_padded = ob_padded_k(N). */
    void (*dot_input)(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q,
                      size_t ldq, const int32_t *sum, ob_acc *acc);
    /* Interleave columns 64*strip.. of xq (M, ldx) by 4 tokens into this ISA's panel of 64 * 4 * ceil(M/4) bytes. */
    void (*pack_token_panel)(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel);
    /* acc[r][j] = sum_m h[r][m] x[m][j]; m_padded = 4 * ceil(M/4); sum = sum_m h[r][m]. */
    void (*dot_weight)(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h,
                       size_t ldh, const int32_t *sum, ob_acc *acc);

    /* out[r][j] = float(acc[r][j]) * (row_scale[r] * s_j) + bias_j for j < columns; s, bias may be NULL (1, none). */
    void (*store_rows)(ob_dtype dt, size_t rows, size_t columns, const ob_acc *acc,
                       const float *row_scale, const float *s, size_t s_len, const float *bias,
                       void *out, size_t ld);
    /* Consume rows i0..i0+rows-1 of a dW tile: votes and by-products. */
    void (*vote_tile[OB_RULE_COUNT])(const ob_vote_strip *strip, size_t i0, size_t rows,
                                     const ob_acc *acc);
    /* The same where a vote plane holds the votes, whatever the rule. */
    void (*hold_tile)(const ob_vote_strip *strip, size_t i0, size_t rows, const ob_acc *acc);
    /* One row's held votes into the rule's planes as one vote.  Returns codes moved. */
    uint64_t (*cast_row[OB_RULE_COUNT])(const ob_cast_row *row);
    /* One row's step: momentum into residual, residual into codes.  Returns codes moved. */
    uint64_t (*flip_row[OB_RULE_COUNT])(const ob_flip_row *row);
} ob_kernels;

OB_INLINE void
ob_kernels_leave(const ob_kernels *kernels)
{
    if (kernels->leave) {
        kernels->leave();
    }
}

/* One table per line of isa/isas.def. */
const ob_kernels *ob_kernels_active(void); /* dispatch.c: picks once */
const ob_kernels *ob_kernels_at(size_t i);

/* One token on a strip of trits5: acc[o] = sum_k T_ok x[k], x (ob_padded_k(K),), sum of x.  Not in the table, because of two
 * processors with the same table one may have the look-up of 64 bytes that it needs.  NULL: decode_trits, dot_forward. */
typedef void (*ob_dot_trits)(size_t k, const uint8_t *trits_strip, const int8_t *x, int32_t sum,
                             int32_t *acc);
ob_dot_trits ob_dot_trits_active(void); /* dispatch.c */

/* peak.c: the active table's int8 multiply-add from registers; returns how many were done, 0 if it has none. */
uint64_t ob_isa_multiply(size_t rounds);

#endif
