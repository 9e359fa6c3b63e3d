/* guard_pages.c - run every operation of every instruction set with every buffer flush against a forbidden page.
 *
 *   guard_pages [every]    every shape of the grid, or each `every`-th of them
 *   guard_pages overrun    read one byte too far on purpose: must die
 *
 * All instruction sets must also leave the same bits.  Prints one line of JSON; a fault names the shape. */
#include "guard.h"

#include "../../csrc/onebit.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct shape {
    size_t m, n, k;
    ob_dtype dt;
    int row_scale, bias;
    ob_rule rule;
    size_t stripes;
    int held; /* with a vote plane */
} shape;

static shape now; /* for the report of a fault */
static const char *operation = "";
static size_t calls;
static uint64_t random_state;

static void
report(const char *what)
{
    fprintf(stderr,
            "%s in %s, isa %s, buffers flush at their %s: M=%zu N=%zu K=%zu %s%s%s rule %s/%zu%s\n",
            what, operation, ob_isa_name(ob_isa_active()), guard_at_end ? "end" : "beginning",
            now.m, now.n, now.k, now.dt == OB_BF16 ? "bf16" : "f32",
            now.row_scale ? " row scales" : "", now.bias ? " bias" : "", ob_rule_name(now.rule),
            now.stripes, now.held ? " held" : "");
}

static void
on_fault(int number)
{
    report(number == SIGABRT ? "guard" : "fault");
    _exit(3);
}

static void
expect(int condition, const char *what)
{
    if (!condition) {
        report(what);
        exit(2);
    }
}

static void
call(const char *name, ob_status status)
{
    expect(status == OB_OK, name);
    calls++;
}

static uint64_t
random_bits(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return random_state >> 33;
}

/* count numbers of type dt, normal-ish, some zero */
static void *
random_floats(size_t count, ob_dtype dt)
{
    size_t width = dt == OB_BF16 ? 2 : 4;
    char *block = guard_take(count * width, width);
    for (size_t i = 0; i < count; i++) {
        float value = (float)(random_bits() % 2001) / 1000.0f - 1.0f;
        value *= random_bits() % 7 ? 1.0f : 0.0f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        uint16_t half = (uint16_t)(bits >> 16);
        memcpy(block + i * width, dt == OB_BF16 ? (void *)&half : (void *)&bits, width);
    }
    return block;
}

static float *
filled(size_t count, float value)
{
    float *block = guard_take(count * 4, 4);
    for (size_t i = 0; i < count; i++) {
        block[i] = value;
    }
    return block;
}

static void *
zeros(size_t bytes, size_t alignment)
{
    return memset(guard_take(bytes, alignment), 0, bytes);
}

/* FNV-1a over what was computed; gives the block back */
static void
absorb(uint64_t *hash, void *block, size_t bytes)
{
    const unsigned char *at = block;
    for (size_t i = 0; i < bytes; i++) {
        *hash = (*hash ^ at[i]) * 1099511628211u;
    }
    guard_give(block);
}

static uint8_t *
check_formats(uint64_t *hash, size_t n, size_t k)
{
    uint8_t *packed[OB_FORMAT_COUNT] = {0};
    size_t bytes[OB_FORMAT_COUNT] = {0};
    int8_t *codes = guard_take(n * k, 1), *back = guard_take(n * k, 1);
    for (size_t i = 0; i < n * k; i++) {
        codes[i] = (int8_t)((int)(random_bits() % 3) - 1);
    }
    for (int f = 0; f < OB_FORMAT_COUNT; f++) {
        operation = ob_format_name((ob_format_id)f);
        if (ob_format_bytes((ob_format_id)f, n, k, &bytes[f]) != OB_OK) {
            continue;
        }
        packed[f] = guard_take(bytes[f], 1);
        call("pack", ob_pack((ob_format_id)f, n, k, codes, packed[f]));
        call("validate", ob_validate((ob_format_id)f, n, k, packed[f]));
        call("unpack", ob_unpack((ob_format_id)f, n, k, packed[f], back));
        expect(n * k == 0 || memcmp(codes, back, n * k) == 0, "codes changed");
        uint8_t *again = guard_take(bytes[f], 1);
        call("convert", ob_convert(OB_FORMAT_tile16, (ob_format_id)f, n, k, packed[0], again));
        expect(bytes[f] == 0 || memcmp(again, packed[f], bytes[f]) == 0, "convert differs");
        guard_give(again);
    }
    for (int f = 1; f < OB_FORMAT_COUNT; f++) {
        absorb(hash, packed[f], bytes[f]);
    }
    guard_give(codes);
    guard_give(back);
    return packed[OB_FORMAT_tile16];
}

/* y as it was, from trits5 */
static void
check_trits(const shape *s, ob_weights w, const void *x, const void *y)
{
    size_t bytes = 0, width = s->dt == OB_BF16 ? 2 : 4, y_bytes = s->m * s->n * width;
    operation = "ob_linear_forward from trits5";
    expect(ob_format_bytes(OB_FORMAT_trits5, s->n, s->k, &bytes) == OB_OK, "trits5");
    uint8_t *trits = guard_take(bytes, 1);
    void *again = guard_take(y_bytes, width);
    call("convert", ob_convert(OB_FORMAT_tile16, OB_FORMAT_trits5, s->n, s->k, w.packed, trits));
    w.packed = trits;
    w.packing = OB_FORMAT_trits5;
    call("forward", ob_linear_forward(&w, s->m, s->dt, x, again, NULL, NULL));
    expect(y_bytes == 0 || memcmp(again, y, y_bytes) == 0, "other bits from trits5");
    guard_give(again);
    guard_give(trits);
}

static size_t
plane_rows(const shape *s, const ob_planes *p)
{
    return ob_active_rows(s->n, p->stripes, p->stripe);
}

static ob_planes
new_planes(const shape *s, uint8_t *packed)
{
    ob_planes p = {.rule = s->rule, .stripes = s->stripes, .stripe = s->stripes / 2};
    size_t strips = (s->k + 63) / 64, rows = plane_rows(s, &p);
    int momentum = ob_rule_momentum_bits(s->rule) > 0;
    size_t bytes = ob_rule_residual_row_bytes(s->rule, s->k);
    p.codes = ob_rule_moves_in_vote(s->rule) && !s->held ? packed : NULL;
    p.votes = s->held ? zeros(rows * s->k * 2, 2) : NULL;
    p.residual = bytes ? zeros(rows * bytes, s->rule == OB_RULE_residual16 ? 2 : 1) : NULL;
    p.momentum = momentum ? zeros(rows * ob_rule_momentum_row_bytes(s->rule, s->k), 1) : NULL;
    p.momentum_scale = momentum ? zeros(rows * strips * 2, 2) : NULL;
    p.row_factor = filled(rows, 0);
    p.col_factor = filled(s->k, 0);
    p.row_sum = filled(rows, 0);
    p.col_sum = filled(s->k, 0);
    p.sketch = filled(rows, 0);
    p.control = zeros(OB_CONTROL_LEN * 8, 8);
    double *c = p.control;
    c[OB_CTL_SEED] = 12345;
    c[OB_CTL_LAYER] = 7;
    c[OB_CTL_ETA] = 0.4;
    c[OB_CTL_GUARD] = c[OB_CTL_SCALE_INIT] = c[OB_CTL_BETA1_POWER] = c[OB_CTL_BETA2_POWER] = 1;
    c[OB_CTL_CAP] = 0.03;
    c[OB_CTL_CLIP] = 2.5;
    c[OB_CTL_BETA1] = 0.8;
    c[OB_CTL_BETA2] = 0.9;
    c[OB_CTL_GRAD_SCALE] = 4;
    c[OB_CTL_RULE] = s->rule;
    c[OB_CTL_STRIPES] = (double)p.stripes;
    c[OB_CTL_STRIPE] = (double)p.stripe;
    operation = "ob_start_residual";
    ob_start_residual(s->n, s->k, packed, &p);
    return p;
}

static void
absorb_planes(uint64_t *hash, const shape *s, ob_planes *p)
{
    size_t strips = (s->k + 63) / 64, rows = plane_rows(s, p);
    absorb(hash, p->residual, rows * ob_rule_residual_row_bytes(s->rule, s->k));
    absorb(hash, p->momentum, rows * ob_rule_momentum_row_bytes(s->rule, s->k));
    absorb(hash, p->momentum_scale, p->momentum ? rows * strips * 2 : 0);
    absorb(hash, p->row_factor, rows * 4);
    absorb(hash, p->col_factor, s->k * 4);
    absorb(hash, p->row_sum, rows * 4);
    absorb(hash, p->col_sum, s->k * 4);
    absorb(hash, p->sketch, rows * 4);
    absorb(hash, p->control, OB_CONTROL_LEN * 8);
    absorb(hash, p->votes, p->votes ? rows * s->k * 2 : 0);
}

/* One layer: two steps of two micro-batches, the first step measuring. */
static uint64_t
run_layer(const shape *s)
{
    uint64_t hash = 14695981039346656037u, moved;
    size_t width = s->dt == OB_BF16 ? 2 : 4, scales = s->row_scale ? s->n : 1, bad;
    random_state = s->m * 1000003 + s->n * 1009 + s->k;
    uint8_t *packed = check_formats(&hash, s->n, s->k);
    float *scale = filled(scales, 0.37f), *bias = s->bias ? filled(s->n, 0.25f) : NULL;
    ob_weights w = {packed, s->n, s->k, scale, scales, bias, OB_FORMAT_tile16};
    ob_planes planes = new_planes(s, packed);
    void *x = random_floats(s->m * s->k, s->dt), *dy = random_floats(s->m * s->n, s->dt);
    void *y = guard_take(s->m * s->n * width, width), *dx = guard_take(s->m * s->k * width, width);
    size_t kept = s->m * ob_padded_k(s->k);
    int8_t *xq = guard_take(kept, 1);
    float *sx = guard_take(s->m * 4, 4), *ds = filled(scales, 0), *db = filled(s->n, 0);

    operation = "ob_linear_forward";
    call("forward", ob_linear_forward(&w, s->m, s->dt, x, y, NULL, NULL));
    call("forward", ob_linear_forward(&w, s->m, s->dt, x, y, xq, sx));
    check_trits(s, w, x, y);
    for (int step = 0; step < 2; step++) {
        for (int micro = 0; micro < 2; micro++) {
            operation = "ob_linear_backward_input";
            call("backward",
                 ob_linear_backward_input(&w, s->m, s->dt, dy, dx, planes.control, &bad));
            operation = "ob_vote";
            call("vote", ob_vote(&w, s->m, s->dt, dy, xq, sx, &planes, NULL, ds, db, &bad));
        }
        operation = "ob_flip";
        call("flip", ob_flip(s->n, s->k, packed, &planes, &moved));
        hash = (hash ^ moved) * 1099511628211u;
    }
    operation = "ob_vote without planes";
    call("vote", ob_vote(&w, s->m, s->dt, dy, xq, sx, NULL, planes.control, ds, db, &bad));
    operation = "ob_discard";
    ob_discard(s->n, s->k, &planes);
    operation = "ob_saturated";
    hash = (hash ^ ob_saturated(s->n, s->k, packed, &planes)) * 1099511628211u;
    operation = "ob_validate after the flips";
    call("validate", ob_validate(OB_FORMAT_tile16, s->n, s->k, packed));

    size_t packed_bytes;
    ob_format_bytes(OB_FORMAT_tile16, s->n, s->k, &packed_bytes);
    absorb(&hash, packed, packed_bytes);
    packed = guard_take(packed_bytes, 1);
    void *dense = random_floats(s->n * s->k, s->dt);
    operation = "ob_absmean";
    call("absmean", ob_absmean(s->n, s->k, s->dt, dense, packed, scale));

    absorb_planes(&hash, s, &planes);
    absorb(&hash, packed, packed_bytes);
    absorb(&hash, scale, 4); /* absmean wrote the first */
    absorb(&hash, y, s->m * s->n * width);
    absorb(&hash, dx, s->m * s->k * width);
    absorb(&hash, xq, kept);
    absorb(&hash, sx, s->m * 4);
    absorb(&hash, ds, scales * 4);
    absorb(&hash, db, s->n * 4);
    guard_give(dense);
    guard_give(x);
    guard_give(dy);
    guard_give(bias);
    expect(guard_taken() == 0, "a block was not given back");
    return hash;
}

static void
run_shape(void)
{
    uint64_t first = 0;
    for (size_t isa = 0; isa < ob_isa_count(); isa++) {
        if (ob_isa_force(isa) != OB_OK) {
            continue;
        }
        for (guard_at_end = 0; guard_at_end < 2; guard_at_end++) {
            uint64_t hash = run_layer(&now);
            first = isa == 0 && !guard_at_end ? hash : first;
            expect(hash == first, "other bits than the first instruction set's");
        }
    }
}

static size_t
run_grid(size_t every)
{
    size_t index = 0, shapes = 0;
    for (size_t m = 0; m <= 17; m = m < 9 ? m + 1 : m + 4) {
        for (size_t n = 0; n <= 130; n = n == 66 ? 127 : n + 1) {
            for (size_t k = 0; k <= 130; k = k == 34 ? 62 : (k == 66 ? 126 : k + 1)) {
                if (index++ % every) {
                    continue;
                }
                size_t odd = index / every * 2654435761u >> 7;
                now = (shape){m,
                              n,
                              k,
                              odd & 1 ? OB_BF16 : OB_F32,
                              odd >> 1 & 1 && n,
                              odd >> 2 & 1,
                              (ob_rule)((odd >> 3) % OB_RULE_COUNT),
                              (odd >> 9) % 4,
                              odd >> 13 & 1};
                ob_set_num_threads(shapes % 16 ? 1 : 3);
                run_shape();
                shapes++;
            }
        }
    }
    return shapes;
}

int
main(int count, char **arguments)
{
    signal(SIGSEGV, on_fault);
    signal(SIGBUS, on_fault);
    signal(SIGABRT, on_fault);
    if (count > 1 && strcmp(arguments[1], "overrun") == 0) {
        operation = "the planted overrun";
        volatile char *block = guard_take(100, 1);
        return block[100];
    }
    size_t shapes = run_grid(count > 1 ? strtoul(arguments[1], NULL, 10) : 1);
    printf("{\"shapes\": %zu, \"calls\": %zu, \"isas\": %zu}\n", shapes, calls, ob_isa_count());
    return 0;
}
