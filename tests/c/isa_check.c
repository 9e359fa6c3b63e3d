/* isa_check.c - every instruction set of this build gives the bits of the naive reference, without Python: for
 * cross-compiled cores under an emulator, and for encodings that no Python module holds.
 *
 *   isa_check [every]     all problems, or each `every`-th of them
 *
 * Three optimizer steps of forward, dX, votes and flips per problem, thread count and instruction set.  The product runs
 * with the caller's floating-point control set to flush subnormals, which no task may see.  Prints one line of JSON; a
 * difference names the array and the problem, and the exit status is 1. */
#include "../../csrc/base/cpu.h"
#include "../../csrc/onebit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind {
    RANDOM,
    LOUD,
    ALTERNATING,
    QUIET,
    KINDS
}; /* LOUD: the largest sums that exist; QUIET: subnormal outputs */
enum { STEPS = 3 };

typedef struct problem {
    size_t m, n, k;
    enum kind kind;
    ob_dtype dt;
    ob_rule rule;
    size_t stripes;
    size_t micro; /* micro-batches per step */
    int row_scale, bias, held;
    /* made from the above */
    size_t plane_bytes, strips;
    void *x, *dy; /* (M, K), (M, N) of type dt */
    float *scale, *bias_values;
    uint8_t *packed;
} problem;

typedef struct outputs {
    void *y, *dx;
    float *sx, *ds, *db;
    int8_t *xq;
    uint8_t *packed;
    ob_planes planes;
    size_t nonfinite;
    uint64_t moved;
} outputs;

typedef struct operations {
    ob_status (*forward)(const ob_weights *, size_t, ob_dtype, const void *, void *, int8_t *,
                         float *);
    ob_status (*backward_input)(const ob_weights *, size_t, ob_dtype, const void *, void *,
                                const double *, size_t *);
    ob_status (*vote)(const ob_weights *, size_t, ob_dtype, const void *, const int8_t *,
                      const float *, ob_planes *, const double *, float *, float *, size_t *);
    ob_status (*flip)(size_t, size_t, uint8_t *, ob_planes *, uint64_t *);
} operations;

static const operations product = {ob_linear_forward, ob_linear_backward_input, ob_vote, ob_flip};
static const operations reference = {ob_reference_linear_forward,
                                     ob_reference_linear_backward_input, ob_reference_vote,
                                     ob_reference_flip};

static uint64_t random_state = 1;
static size_t compared, differences;

static void
check(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "isa_check: %s\n", what);
        exit(2);
    }
}

static void *
zeros(size_t bytes)
{
    void *block = ob_alloc(bytes + 1);
    check(block != NULL, "out of memory");
    return memset(block, 0, bytes);
}

static uint32_t
random_bits(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

static float
value_at(const problem *p, size_t i)
{
    float random = (float)(random_bits() % 20001) * 1e-4f - 1.0f;
    switch (p->kind) {
    case LOUD:
        return 1.0f;
    case ALTERNATING:
        return i / 4 % 2 ? -1.0f : 1.0f;
    case QUIET:
        return random * 1e-5f;
    default:
        return i % 97 == 5 ? 0.0f : random;
    }
}

static void *
make_values(const problem *p, size_t count)
{
    size_t width = p->dt == OB_BF16 ? 2 : 4;
    char *block = zeros(count * width);
    for (size_t i = 0; i < count; i++) {
        float value = value_at(p, i);
        memcpy(block + i * width, (char *)&value + (4 - width),
               width); /* little endian; bf16: the upper half */
    }
    return block;
}

static void
make_problem(problem *p)
{
    size_t count = p->n * p->k;
    int8_t *codes = zeros(count);
    for (size_t i = 0; i < count; i++) {
        codes[i] = (int8_t)(p->kind == LOUD ? 1 : (int)(random_bits() % 3) - 1);
    }
    p->strips = (p->k + 63) / 64;
    check(ob_format_bytes(OB_FORMAT_tile16, p->n, p->k, &p->plane_bytes) == OB_OK, "format_bytes");
    p->packed = zeros(p->plane_bytes);
    check(ob_pack(OB_FORMAT_tile16, p->n, p->k, codes, p->packed) == OB_OK, "pack");
    ob_free(codes);
    p->x = make_values(p, p->m * p->k);
    p->dy = make_values(p, p->m * p->n);
    p->scale = zeros((p->row_scale ? p->n : 1) * sizeof(float));
    for (size_t i = 0; i < (p->row_scale ? p->n : 1); i++) {
        p->scale[i] = (p->kind == QUIET ? 1e-34f : 0.05f) +
                      0.01f * (float)(p->kind != QUIET) * (float)(i % 7);
    }
    p->bias_values = p->bias ? zeros(p->n * sizeof(float)) : NULL;
    for (size_t i = 0; p->bias && i < p->n; i++) {
        p->bias_values[i] = (float)(i % 11) * 0.1f - 0.5f;
    }
}

static void
free_problem(problem *p)
{
    void *blocks[] = {p->x, p->dy, p->scale, p->bias_values, p->packed};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        ob_free(blocks[i]);
    }
}

static size_t
plane_rows(const problem *p)
{
    return ob_active_rows(p->n, p->stripes, p->stripes / 2);
}

static outputs
make_outputs(const problem *p)
{
    static const double control[OB_CONTROL_LEN] = {
        [OB_CTL_SEED] = 7,        [OB_CTL_LAYER] = 3,      [OB_CTL_ETA] = 0.3,
        [OB_CTL_ETA_PEAK] = 0.3,  [OB_CTL_GUARD] = 0.9,    [OB_CTL_CAP] = 0.02,
        [OB_CTL_CLIP] = 2.5,      [OB_CTL_BETA1] = 0.85,   [OB_CTL_BETA2] = 0.9,
        [OB_CTL_GRAD_SCALE] = 2,  [OB_CTL_SCALE_INIT] = 1, [OB_CTL_BETA1_POWER] = 1,
        [OB_CTL_BETA2_POWER] = 1,
    };
    size_t rows = plane_rows(p), momentum = rows * ob_rule_momentum_row_bytes(p->rule, p->k);
    outputs o = {
        .y = zeros(p->m * p->n * 4),
        .dx = zeros(p->m * p->k * 4),
        .sx = zeros(p->m * 4),
        .ds = zeros(p->n * 4 + 4),
        .db = zeros(p->n * 4),
        .xq = zeros(p->m * ob_padded_k(p->k)),
        .packed = zeros(p->plane_bytes),
        .planes = {.rule = p->rule,
                   .stripes = p->stripes,
                   .stripe = p->stripes / 2,
                   .residual = zeros(rows * ob_rule_residual_row_bytes(p->rule, p->k)),
                   .momentum = momentum ? zeros(momentum) : NULL,
                   .momentum_scale = momentum ? zeros(rows * p->strips * 2) : NULL,
                   .row_factor = zeros(rows * 4),
                   .col_factor = zeros(p->k * 4),
                   .row_sum = zeros(rows * 4),
                   .col_sum = zeros(p->k * 4),
                   .sketch = zeros(rows * 4),
                   .control = zeros(sizeof control),
                   .votes = p->held ? zeros(rows * p->k * 2) : NULL},
    };
    memcpy(o.packed, p->packed, p->plane_bytes);
    memcpy(o.planes.control, control, sizeof control);
    o.planes.control[OB_CTL_STRIPE] = (double)o.planes.stripe;
    o.planes.codes = ob_rule_moves_in_vote(p->rule) && !p->held ? o.packed : NULL;
    ob_start_residual(p->n, p->k, o.packed, &o.planes);
    return o;
}

typedef struct field {
    const char *name;
    void *data;
    size_t bytes;
} field;

enum { FIELDS = 17 };

static void
list_fields(const problem *p, outputs *o, field *f)
{
    const ob_planes *planes = &o->planes;
    size_t width = p->dt == OB_BF16 ? 2 : 4, rows = plane_rows(p);
    const field fields[FIELDS] = {
        {"y", o->y, p->m * p->n * width},
        {"dx", o->dx, p->m * p->k * width},
        {"sx", o->sx, p->m * 4},
        {"ds", o->ds, p->row_scale ? p->n * 4 : 4},
        {"db", o->db, p->n * 4},
        {"xq", o->xq, p->m * ob_padded_k(p->k)},
        {"codes", o->packed, p->plane_bytes},
        {"residual", planes->residual, rows * ob_rule_residual_row_bytes(p->rule, p->k)},
        {"momentum", planes->momentum, rows * ob_rule_momentum_row_bytes(p->rule, p->k)},
        {"momentum scale", planes->momentum_scale, planes->momentum ? rows * p->strips * 2 : 0},
        {"row factor", planes->row_factor, rows * 4},
        {"column factor", planes->col_factor, p->k * 4},
        {"row sum", planes->row_sum, rows * 4},
        {"column sum", planes->col_sum, p->k * 4},
        {"sketch", planes->sketch, rows * 4},
        {"control", planes->control, OB_CONTROL_LEN * sizeof(double)},
        {"votes", planes->votes, planes->votes ? rows * p->k * 2 : 0},
    };
    memcpy(f, fields, sizeof fields);
}

static void
free_outputs(const problem *p, outputs *o)
{
    field fields[FIELDS];
    list_fields(p, o, fields);
    for (size_t i = 0; i < FIELDS; i++) {
        ob_free(fields[i].data);
    }
}

/* The forward once more, from trits5: y as it was */
static void
forward_trits(const problem *p, const operations *run, const outputs *o, ob_weights w)
{
    size_t bytes = 0, y_bytes = p->m * p->n * (p->dt == OB_BF16 ? 2 : 4);
    check(!ob_format_bytes(OB_FORMAT_trits5, p->n, p->k, &bytes), "trits5");
    uint8_t *trits = zeros(bytes), *y = zeros(y_bytes);
    check(!ob_convert(OB_FORMAT_tile16, OB_FORMAT_trits5, p->n, p->k, w.packed, trits), "convert");
    w.packed = trits;
    w.packing = OB_FORMAT_trits5;
    check(!run->forward(&w, p->m, p->dt, p->x, y, NULL, NULL), "forward from trits5");
    differences += y_bytes && memcmp(y, o->y, y_bytes) != 0;
    ob_free(trits);
    ob_free(y);
}

static void
train(const problem *p, const operations *run, outputs *o)
{
    ob_weights w = {o->packed, p->n, p->k, p->scale, p->row_scale ? p->n : 1, p->bias_values, 0};
    ob_planes *planes = &o->planes;
    for (size_t step = 0; step < STEPS; step++) {
        for (size_t micro = 0; micro < p->micro; micro++) {
            size_t bad = 0;
            check(!run->forward(&w, p->m, p->dt, p->x, o->y, o->xq, o->sx), "forward");
            forward_trits(p, run, o, w);
            check(!run->backward_input(&w, p->m, p->dt, p->dy, o->dx, planes->control, &bad), "dX");
            check(
                !run->vote(&w, p->m, p->dt, p->dy, o->xq, o->sx, planes, NULL, o->ds, o->db, &bad),
                "vote");
            o->nonfinite += bad;
        }
        if (step + 1 < STEPS) { /* the last step's sums are compared before they are used up */
            uint64_t moved = 0;
            check(!run->flip(p->n, p->k, o->packed, planes, &moved), "flip");
            o->moved += moved;
        }
    }
}

static void
compare(const problem *p, outputs *want, outputs *got, size_t threads)
{
    field a[FIELDS], b[FIELDS];
    list_fields(p, want, a);
    list_fields(p, got, b);
    differences += want->moved != got->moved || want->nonfinite != got->nonfinite;
    for (size_t i = 0; i < FIELDS; i++) {
        compared += a[i].bytes;
        if (a[i].bytes && memcmp(a[i].data, b[i].data, a[i].bytes) != 0) {
            differences++;
            fprintf(stderr,
                    "%s differs: %s, %zu threads, M=%zu N=%zu K=%zu kind %d %s %s%s/%zu micro "
                    "%zu%s%s\n",
                    a[i].name, ob_isa_name(ob_isa_active()), threads, p->m, p->n, p->k, p->kind,
                    p->dt == OB_BF16 ? "bf16" : "f32", ob_rule_name(p->rule),
                    p->held ? " held" : "", p->stripes, p->micro, p->row_scale ? " row scales" : "",
                    p->bias ? " bias" : "");
        }
    }
}

/* Flush subnormals in this thread, as torch.set_flush_denormal(True) does; ob_fp_restore ends it. */
static uint64_t
flush_subnormals(void)
{
    uint64_t saved = ob_fp_default();
#if defined(__x86_64__)
    ob_fp_restore(saved | 0x8040); /* FTZ, DAZ */
#elif defined(__aarch64__)
    ob_fp_restore(saved | (1u << 24)); /* FZ */
#endif
    return saved;
}

static void
check_problem(problem *p)
{
    make_problem(p);
    outputs want = make_outputs(p);
    train(p, &reference, &want);
    for (size_t isa = 0; isa < ob_isa_count(); isa++) {
        for (size_t threads = 1; ob_isa_supported(isa) && threads <= 3; threads += 2) {
            check(ob_isa_force(isa) == OB_OK && ob_set_num_threads(threads) == OB_OK, "force");
            outputs got = make_outputs(p);
            uint64_t saved = flush_subnormals();
            train(p, &product, &got);
            ob_fp_restore(saved);
            compare(p, &want, &got, threads);
            free_outputs(p, &got);
        }
    }
    free_outputs(p, &want);
    free_problem(p);
}

int
main(int count, char **words)
{
    /* around every tile edge, and past the 256 and 512 entries whose sums fit int16 */
    static const size_t shapes[][3] = {
        {1, 1, 1},     {5, 65, 17},   {7, 64, 64},  {8, 130, 100},  {33, 16, 16},
        {6, 128, 256}, {13, 70, 191}, {3, 200, 63}, {64, 64, 65},   {19, 37, 130},
        {4, 0, 3},     {2, 3, 0},     {0, 3, 3},    {17, 530, 66},  {9, 66, 1100},
        {2, 9, 600},   {263, 7, 80},  {521, 5, 3},  {70, 128, 128},
    };
    size_t every = count > 1 ? strtoul(words[1], NULL, 10) : 1, made = 0, index = 0;
    check(every > 0, "isa_check [every]: a positive number");
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        for (int kind = 0; kind < KINDS; kind++) {
            for (int rule = 0; rule < OB_RULE_COUNT; rule++, index++) {
                if (index % every == 0) {
                    problem p = {.m = shapes[s][0],
                                 .n = shapes[s][1],
                                 .k = shapes[s][2],
                                 .kind = (enum kind)kind,
                                 .dt = (index / 3) % 2 ? OB_BF16 : OB_F32,
                                 .rule = (ob_rule)rule,
                                 .stripes = index % 4 == 3 ? 3 : 1,
                                 .micro = 1 + 2 * (s % 2),
                                 .row_scale = (s + (size_t)rule) % 2 == 1,
                                 .bias = (s + (size_t)kind) % 2 == 1,
                                 .held = (index / 5) % 2 == 1};
                    check_problem(&p);
                    made++;
                }
            }
        }
    }
    printf("{\"problems\": %zu, \"bytes\": %zu, \"differences\": %zu, \"isas\": [\"", made,
           compared, differences);
    for (size_t isa = 0; isa < ob_isa_count(); isa++) {
        if (ob_isa_supported(isa)) {
            printf("%s%s", isa ? "\", \"" : "", ob_isa_name(isa));
        }
    }
    printf("\"]}\n");
    return differences > 0;
}
