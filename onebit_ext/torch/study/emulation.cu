/* emulation.cu - the rule of csrc/README.md on dense arrays, one thread for each piece, for a GPU; and, compiled as plain C,
 * for the test that compares it with the C core bit for bit.  A study tool: codes and residuals are not packed.
 *
 * One micro-batch a step, a tensor scale, finite gradients, K a multiple of 64, M of 16, N of 8.  Votes and flips of a layer
 * are one kernel: with one micro-batch nothing lies between them.  A kernel's arguments are pointers p and numbers n,
 * named in its first lines.  Build: nvcc -fmad=false, cc -ffp-contract=off. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct arguments {
    void *p[16];
    int64_t n[12];
} arguments;

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define EXPORT extern "C"
#define KERNEL(name)                                                                          \
    __global__ void kernel_##name(arguments a, int64_t count)                                 \
    {                                                                                         \
        int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;                           \
        if (i < count) {                                                                      \
            name(i, &a);                                                                      \
        }                                                                                     \
    }                                                                                         \
    EXPORT int launch_##name(const arguments *a, int64_t count, void *stream)                 \
    {                                                                                         \
        kernel_##name<<<(unsigned)((count + 127) / 128), 128, 0, (cudaStream_t)stream>>>(*a, count); \
        return (int)cudaGetLastError();                                                       \
    }
DEVICE void
largest(uint32_t *at, uint32_t value)
{
    atomicMax((unsigned *)at, (unsigned)value);
}
DEVICE void
count_up(int32_t *at, int32_t value)
{
    atomicAdd((int *)at, (int)value);
}
DEVICE float
float_of(uint32_t bits)
{
    return __uint_as_float(bits);
}
DEVICE uint32_t
bits_of(float value)
{
    return __float_as_uint(value);
}
#else
#define DEVICE static inline
#define EXPORT
#define KERNEL(name)                                                            \
    EXPORT int launch_##name(const arguments *a, int64_t count, void *stream)   \
    {                                                                           \
        (void)stream;                                                           \
        for (int64_t i = 0; i < count; i++) {                                   \
            name(i, a);                                                         \
        }                                                                       \
        return 0;                                                               \
    }
DEVICE void
largest(uint32_t *at, uint32_t value)
{
    *at = *at > value ? *at : value;
}
DEVICE void
count_up(int32_t *at, int32_t value)
{
    *at += value;
}
DEVICE float
float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE uint32_t
bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
#endif

/* Sixteen bytes at once: a GPU stores them as one. */
typedef struct __attribute__((aligned(16))) sixteen {
    int8_t code[16];
} sixteen;
typedef struct __attribute__((aligned(16))) four {
    int32_t value[4];
} four;

#define TINY 0x1p-100f
enum { STRIP = 64, TOKENS = 16, ROWS = 256 };
/* Fields of csrc/onebit.h's control that are read here; the test compares them with `_core.CONTROL`. */
enum { SEED, LAYER, STEP, MICRO, NONFINITE, ETA, ETA_PEAK, GUARD, CAP, CLIP, BETA1, BETA2, GRAD_SCALE, ENERGY, MOVED,
       SCALE_INIT, POWER1, POWER2, STRIPES, STRIPE, VOTE_MOVED, RULE };
enum { INPUT_GRAD = 1, WEIGHT_GRAD, VOTE, MOMENTUM, MOMENTUM_STEP, STREAMS };
enum { MEAN_R = 32, KEYS = 40 }; /* behind the control: what a step leaves for the next, float64, and uint64 by stream */

/* ------------------------------------------------------------------ random numbers, as csrc/base/rng.h */
DEVICE uint64_t
mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* The number at column 0 of a row, 24 bits. */
DEVICE uint32_t
first_number(const double *control, int stream, int64_t row)
{
    uint64_t key;
    memcpy(&key, control + KEYS + stream, 8);
    uint32_t turn = stream < VOTE ? 0 : (uint32_t)(uint64_t)control[STEP] * 0x9E3779B9u;
    return ((uint32_t)mix(key + (uint64_t)row) + turn) >> 8;
}

DEVICE float
uniform(uint32_t first, int64_t column)
{
    return (float)((first + (uint32_t)column * 0x6A09E7u) & 0xFFFFFFu) * 0x1p-24f;
}

DEVICE float
round_within(float v, float r, float limit)
{
    return fmaxf(fminf(floorf(v + r), limit), -limit);
}

/* Pieces fit 32 bits, in which a GPU divides faster. */
DEVICE int64_t
part(int64_t i, int64_t size)
{
    return (int64_t)((uint32_t)i / (uint32_t)size);
}

DEVICE int64_t
rest(int64_t i, int64_t size)
{
    return (int64_t)((uint32_t)i % (uint32_t)size);
}

/* ------------------------------------------------------------------ float32 and bfloat16 */
DEVICE float
load(const void *at, int64_t i, int64_t bf16)
{
    return bf16 ? float_of((uint32_t)((const uint16_t *)at)[i] << 16) : ((const float *)at)[i];
}

DEVICE void
store(void *at, int64_t i, int64_t bf16, float v)
{
    if (bf16) {
        uint32_t bits = bits_of(v);
        ((uint16_t *)at)[i] = (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    }
    else {
        ((float *)at)[i] = v;
    }
}

/* ------------------------------------------------------------------ activations
 * x (M, K), absmax (M,) -> xq (M, K) and its transpose (K, M) if wanted, sx (M,); a thread has 16 tokens of a column */
DEVICE void
quantize_tokens(int64_t i, const arguments *a)
{
    const void *x = a->p[0];
    const float *absmax = (const float *)a->p[1];
    int8_t *xq = (int8_t *)a->p[2], *turned = (int8_t *)a->p[3];
    float *sx = (float *)a->p[4];
    int64_t tokens = a->n[0], inputs = a->n[1], bf16 = a->n[2], k = rest(i, inputs), first = part(i, inputs) * TOKENS;
    sixteen column;
    for (int j = 0; j < TOKENS; j++) {
        int64_t m = first + j;
        float top = fmaxf(absmax[m], 1e-5f);
        float q = rintf(load(x, m * inputs + k, bf16) * (127.0f / top));
        int8_t code = (int8_t)fmaxf(fminf(q, 127.0f), -127.0f);
        xq[m * inputs + k] = code;
        column.code[j] = code;
        if (k == 0) {
            sx[m] = top / 127.0f;
        }
    }
    if (turned) {
        *(sixteen *)(turned + k * tokens + first) = column;
    }
}
KERNEL(quantize_tokens)

/* y (M, N) = float(acc) * (sx * s), four at a time */
DEVICE void
scale_outputs(int64_t i, const arguments *a)
{
    four acc = ((const four *)a->p[0])[i];
    const float *sx = (const float *)a->p[1], *s = (const float *)a->p[2];
    float factor = sx[part(i, a->n[0] / 4)] * (s ? *s : 1.0f);
    for (int j = 0; j < 4; j++) {
        store(a->p[3], i * 4 + j, a->n[1], (float)acc.value[j] * factor);
    }
}
KERNEL(scale_outputs)

/* ------------------------------------------------------------------ gradients
 * dy (M, N), absmax of dy (M,) -> codes (M, N) of dy * s and their scale (M,), eight at a time */
DEVICE void
round_tokens(int64_t i, const arguments *a)
{
    const void *dy = a->p[0];
    const float *absmax = (const float *)a->p[1], *s = (const float *)a->p[2];
    int8_t *codes = (int8_t *)a->p[3];
    float *scale = (float *)a->p[4];
    const double *control = (const double *)a->p[5];
    int64_t outputs = a->n[0], bf16 = a->n[1], m = part(i, outputs / 8);
    float top = absmax[m] * *s, inverse = top < TINY ? 0.0f : 127.0f / top;
    uint32_t random = first_number(control, INPUT_GRAD, m);
    for (int64_t j = i * 8; j < i * 8 + 8; j++) {
        float v = (load(dy, j, bf16) * *s) * inverse;
        codes[j] = top < TINY ? (int8_t)0 : (int8_t)round_within(v, uniform(random, j - m * outputs), 127.0f);
    }
    if (i * 8 == m * outputs) {
        scale[m] = top < TINY ? 0.0f : top / 127.0f;
    }
}
KERNEL(round_tokens)

/* tops (N',) = max over tokens of the bits of |dy * sx|; zero before. Only rows n % STRIPES == STRIPE. */
DEVICE void
outputs_absmax(int64_t i, const arguments *a)
{
    const float *sx = (const float *)a->p[1];
    const double *control = (const double *)a->p[3];
    int64_t tokens = a->n[0], outputs = a->n[1], bf16 = a->n[2], rows = a->n[3], row = rest(i, rows), first = part(i, rows) * STRIP;
    int64_t n = (int64_t)control[STRIPE] + (int64_t)control[STRIPES] * row;
    uint32_t top = 0;
    for (int64_t m = first; m < first + STRIP && m < tokens; m++) {
        uint32_t bits = bits_of(load(a->p[0], m * outputs + n, bf16) * sx[m]) & 0x7FFFFFFFu;
        top = top > bits ? top : bits;
    }
    largest((uint32_t *)a->p[2] + row, top);
}
KERNEL(outputs_absmax)

/* hq (N', M) = SR(dy * sx * (127 / top)), hs (N',) */
DEVICE void
round_outputs(int64_t i, const arguments *a)
{
    const float *sx = (const float *)a->p[1];
    const double *control = (const double *)a->p[3];
    int8_t *hq = (int8_t *)a->p[4];
    int64_t tokens = a->n[0], outputs = a->n[1], bf16 = a->n[2], rows = a->n[3], row = rest(i, rows);
    int64_t n = (int64_t)control[STRIPE] + (int64_t)control[STRIPES] * row, first = part(i, rows) * TOKENS;
    float top = float_of(((const uint32_t *)a->p[2])[row]), inverse = top < TINY ? 0.0f : 127.0f / top;
    uint32_t random = first_number(control, WEIGHT_GRAD, n);
    sixteen codes;
    for (int j = 0; j < TOKENS; j++) {
        float v = (load(a->p[0], (first + j) * outputs + n, bf16) * sx[first + j]) * inverse;
        codes.code[j] = top < TINY ? (int8_t)0 : (int8_t)round_within(v, uniform(random, first + j), 127.0f);
    }
    *(sixteen *)(hq + row * tokens + first) = codes;
    if (first == 0) {
        ((float *)a->p[5])[row] = top < TINY ? 0.0f : top / 127.0f;
    }
}
KERNEL(round_outputs)

/* ------------------------------------------------------------------ votes and flips */
typedef struct strip {
    int64_t n, at, inputs; /* output, index of the first column in its (N', K) plane */
    int8_t *codes, *turned; /* (N, K) and (K, N) */
    int16_t *residual;
    int64_t outputs, first;
    int32_t moved;
} strip;

DEVICE int
code_of(const strip *s, int64_t j)
{
    return s->codes[s->n * s->inputs + s->first + j];
}

DEVICE void
set_code(strip *s, int64_t j, int before, int now)
{
    if (now != before) {
        s->codes[s->n * s->inputs + s->first + j] = (int8_t)now;
        s->turned[(s->first + j) * s->outputs + s->n] = (int8_t)now;
        s->moved++;
    }
}

DEVICE int
clamped(int v, int limit)
{
    return v > limit ? limit : v < -limit ? -limit : v;
}

/* One vote of column j, rounded: into the residual, then what step() does with it. */
DEVICE void
apply(strip *s, int64_t j, int vote, int bits, int units)
{
    int half = units / 2, t = code_of(s, j), now;
    if (bits < 8) { /* code and residual are one number, units * T + e */
        int e = bits ? s->residual[s->at + j] : 0, sum = clamped(units * t + e + vote, units + half);
        now = sum > half ? 1 : sum < -half ? -1 : 0;
        if (bits) {
            s->residual[s->at + j] = (int16_t)(sum - units * now);
        }
    }
    else {
        int e = clamped(s->residual[s->at + j] + vote, bits == 16 ? 16256 : 127);
        if (units == 85) { /* one byte: the code is a reading of it */
            now = e > half ? 1 : e < -half ? -1 : 0;
        }
        else {
            int up = e > half && t < 1, down = e < -half && t > -1;
            now = t + up - down;
            e = up ? e - units : down ? e + units : clamped(e, half);
        }
        s->residual[s->at + j] = (int16_t)e;
    }
    set_code(s, j, t, now);
}

/* 64 columns of one row: sums of g^2 and of T * acc, the vote, the flip.  acc (N', K), partial sums by strip. */
DEVICE void
vote_strip(int64_t i, const arguments *a)
{
    const int32_t *acc = (const int32_t *)a->p[0];
    const float *hs = (const float *)a->p[1], *scale = (const float *)a->p[2];
    const double *control = (const double *)a->p[3];
    const float *row_factor = (const float *)a->p[4], *column_factor = (const float *)a->p[5];
    int8_t *momentum = (int8_t *)a->p[9];
    float *momentum_scale = (float *)a->p[10];
    int64_t inputs = a->n[1], rows = a->n[2], strips = inputs / STRIP, row = part(i, strips), index = rest(i, strips);
    int bits = (int)a->n[3], momentum_bits = (int)a->n[4], units = (int)a->n[5];
    strip s = {(int64_t)control[STRIPE] + (int64_t)control[STRIPES] * row, row * inputs + index * STRIP, inputs,
               (int8_t *)a->p[6], (int8_t *)a->p[7], (int16_t *)a->p[8], a->n[0], index * STRIP, 0};
    acc += s.at;
    float lane[16], h = hs[row], sn = *scale * (float)(1.0 / control[GRAD_SCALE]);
    int64_t product = 0;
    for (int l = 0; l < 16; l++) {
        for (int q = 0; q < 4; q++) {
            float g = (float)acc[l + 16 * q] * (h * sn);
            lane[l] = q ? lane[l] + g * g : g * g;
            product += (int64_t)code_of(&s, l + 16 * q) * acc[l + 16 * q];
        }
    }
    for (int half = 8; half > 0; half /= 2) {
        for (int l = 0; l < half; l++) {
            lane[l] = lane[l] + lane[l + half];
        }
    }
    ((float *)a->p[11])[index * rows + row] = lane[0];
    ((int64_t *)a->p[12])[index * rows + row] = product;
    if (bits < 0 || !(control[STEP] > 0)) {
        return;
    }
    float ratio = row_factor[row] / (float)control[MEAN_R], clip = (float)control[CLIP];
    float an = ratio > 0.0f ? (h * sn) / sqrtf(ratio) : 0.0f;
    an = fabsf(an) < 0x1p90f ? an : 0.0f;
    float eta = control[CAP] > 0 ? fminf((float)control[ETA], 0.06f) : (float)control[ETA];
    float step = (-(float)units * eta) * (float)control[GUARD];
    float u[STRIP], limit = bits == 16 ? 16256.0f : 127.0f;
    for (int j = 0; j < STRIP; j++) {
        float factor = column_factor[s.first + j], c = factor > 0.0f ? 1.0f / sqrtf(factor) : 0.0f;
        float v = ((float)acc[j] * an) * c;
        u[j] = fmaxf(fminf(v, clip), -clip);
    }
    if (momentum_bits) {
        float keep = (float)control[BETA1], take = (float)(1.0 - control[BETA1]), old = momentum_scale[i], top = 0.0f;
        float most = momentum_bits == 8 ? 127.0f : 7.0f;
        uint32_t random = first_number(control, MOMENTUM, s.n);
        for (int j = 0; j < STRIP; j++) {
            u[j] = keep * ((float)momentum[s.at + j] * old) + take * u[j];
            top = fmaxf(top, fabsf(u[j]));
        }
        float now = top < TINY ? 0.0f : float_of((bits_of(top / most) + 0xFFFFu) & 0xFFFF0000u), inverse = 1.0f / now;
        momentum_scale[i] = now;
        for (int j = 0; j < STRIP; j++) {
            float code = top < TINY ? 0.0f : round_within(u[j] * inverse, uniform(random, s.first + j), most);
            momentum[s.at + j] = (int8_t)code;
            u[j] = code * now;
        }
    }
    uint32_t random = first_number(control, momentum_bits ? MOMENTUM_STEP : VOTE, s.n);
    float zone = (float)a->n[6] * 0.5f;
    for (int j = 0; j < STRIP; j++) {
        float beyond = fmaxf(u[j] - zone, 0.0f) + fminf(u[j] + zone, 0.0f);
        float v = round_within(beyond * step, uniform(random, s.first + j), limit);
        apply(&s, j, (int)v, bits, units);
    }
    if (s.moved) {
        count_up((int32_t *)a->p[13], s.moved);
    }
}
KERNEL(vote_strip)

/* partial (blocks, K) = sums of g^2 over ROWS rows in order */
DEVICE void
column_squares(int64_t i, const arguments *a)
{
    const int32_t *acc = (const int32_t *)a->p[0];
    const float *hs = (const float *)a->p[1], *scale = (const float *)a->p[2];
    const double *control = (const double *)a->p[3];
    int64_t inputs = a->n[1], rows = a->n[2], k = rest(i, inputs), first = part(i, inputs) * ROWS;
    float sn = *scale * (float)(1.0 / control[GRAD_SCALE]), total = 0.0f;
    for (int64_t row = first; row < first + ROWS && row < rows; row++) {
        float g = (float)acc[row * inputs + k] * (hs[row] * sn);
        total = total + g * g;
    }
    ((float *)a->p[4])[i] = total;
}
KERNEL(column_squares)

/* factor (len,) = running mean of (partial sums added in order) / count; also the exact T * acc of a row */
DEVICE void
collect(int64_t i, const arguments *a)
{
    const float *partial = (const float *)a->p[0];
    float *factor = (float *)a->p[1];
    const double *control = (const double *)a->p[2];
    const int64_t *products = (const int64_t *)a->p[3];
    int64_t len = a->n[0], parts = a->n[1], product = 0;
    float total = partial[i], keep = (float)control[BETA2], take = (float)(1.0 - control[BETA2]);
    for (int64_t part = 1; part < parts; part++) {
        total = total + partial[part * len + i];
    }
    float r = total / (float)a->n[2];
    factor[i] = control[STEP] > 0 ? keep * factor[i] + take * r : r;
    if (products) {
        for (int64_t part = 0; part < parts; part++) {
            product += products[part * len + i];
        }
        ((int64_t *)a->p[4])[i] = product;
    }
}
KERNEL(collect)

/* ------------------------------------------------------------------ what is left of the step, one thread a layer */
DEVICE void
start_step(double *control)
{
    uint64_t layer = mix(mix((uint64_t)control[SEED]) ^ (uint64_t)control[LAYER]);
    uint64_t now = (uint64_t)control[STEP] + ((uint64_t)control[STRIPE] << 32);
    for (int stream = 0; stream < STREAMS; stream++) {
        uint64_t step = stream < VOTE ? now : 0u; /* a vote's draws turn instead */
        uint64_t key = mix(mix(mix(layer ^ step) ^ 0u) ^ (uint64_t)stream);
        memcpy(control + KEYS + stream, &key, 8);
    }
}

DEVICE void
scale_step(double *control, double lr, float grad, float *scale, float *moments)
{
    float b1 = (float)control[BETA1], take1 = (float)(1.0 - control[BETA1]);
    float b2 = (float)control[BETA2], take2 = (float)(1.0 - control[BETA2]);
    control[POWER1] *= control[BETA1];
    control[POWER2] *= control[BETA2];
    float g = grad * (float)(1.0 / control[GRAD_SCALE]);
    moments[0] = b1 * moments[0] + take1 * g;
    moments[1] = b2 * moments[1] + (take2 * g) * g;
    float rate = (float)(lr * control[SCALE_INIT]), correct1 = (float)(1.0 - control[POWER1]);
    float correct2 = (float)(1.0 - control[POWER2]);
    float s = *scale - (rate * (moments[0] / correct1)) / (sqrtf(moments[1] / correct2) + 1e-8f);
    s = s > 1e-8f ? s : 1e-8f;
    *scale = 1.0f / (1.0f / s);
}

/* table (layers, 8): control, R, products, hs, scale, moments (2,), moved, ds; sizes (layers, 2): N', K */
DEVICE void
finish_step(int64_t i, const arguments *a)
{
    void **table = (void **)a->p[0] + 8 * i;
    const int64_t *sizes = (const int64_t *)a->p[1] + 2 * i, rows = sizes[0];
    const double *rates = (const double *)a->p[2]; /* eta of the next step, scale's lr of this one */
    double *control = (double *)table[0], eta = control[ETA], factor = 1.05, total = 0.0, sum = 0.0;
    const float *row_factor = (const float *)table[1], *hs = (const float *)table[3];
    int32_t *moved = (int32_t *)table[6];
    if (a->n[0]) { /* votes or at least the scale's gradient */
        for (int64_t row = 0; row < rows; row++) {
            total += (double)((const int64_t *)table[2])[row] * (double)hs[row];
            sum += row_factor[row];
        }
        *(float *)table[7] = (float)(total * control[STRIPES]);
    }
    if (rates[1] > 0) {
        scale_step(control, rates[1], *(float *)table[7], (float *)table[4], (float *)table[5]);
    }
    control[ETA_PEAK] = eta > control[ETA_PEAK] ? eta : control[ETA_PEAK];
    if (control[CAP] > 0 && eta > 0) {
        if (*moved) {
            factor = control[CAP] * (eta / control[ETA_PEAK]) / ((double)*moved / ((double)rows * (double)sizes[1]));
        }
        factor = fmin(fmax(factor, 0.8), 1.05);
        control[GUARD] = fmin(fmax(control[GUARD] * factor, 1e-3), 1.0);
    }
    control[STEP] += 1.0;
    control[MOVED] = (double)*moved;
    *moved = 0;
    control[MEAN_R] = (double)(float)(sum / (double)rows);
    control[ETA] = rates[0];
    start_step(control);
}
KERNEL(finish_step)

/* A control (48,) as training or a stripe starts: the keys of its first step. */
DEVICE void
begin(int64_t i, const arguments *a)
{
    start_step((double *)a->p[0] + 48 * i);
}
KERNEL(begin)
