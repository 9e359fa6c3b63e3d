/* vocabulary_neon.h - the vocabulary of kernels/all.tmpl.h on AArch64's NEON: 16 lanes are four registers. */
#ifndef OB_VOCABULARY_NEON_H
#define OB_VOCABULARY_NEON_H

#include <arm_neon.h>
#include <string.h>

#include "../base/config.h"

typedef struct {
    float32x4_t a, b, c, d;
} vf;
typedef struct {
    int32x4_t a, b, c, d;
} vi;

#define V1(type, f, x) ((type){f((x).a), f((x).b), f((x).c), f((x).d)})
#define V2(type, f, x, y) \
    ((type){f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)})
#define V2N(type, f, x, n) ((type){f((x).a, n), f((x).b, n), f((x).c, n), f((x).d, n)})

/* clang-format off */
OB_INLINE uint32x4_t as_unsigned(int32x4_t x) { return vreinterpretq_u32_s32(x); }
OB_INLINE int32x4_t as_signed(uint32x4_t x) { return vreinterpretq_s32_u32(x); }
OB_INLINE int32x4_t srl4(int32x4_t x, int n) { return as_signed(as_unsigned(x) >> (uint32_t)n); }
OB_INLINE int32x4_t sra4(int32x4_t x, int n) { return x >> n; }
OB_INLINE int32x4_t sll4(int32x4_t x, int n) { return as_signed(as_unsigned(x) << (uint32_t)n); }
OB_INLINE int32x4_t srlv4(int32x4_t x, int32x4_t n) { return as_signed(vshlq_u32(as_unsigned(x), vnegq_s32(n))); }
OB_INLINE int32x4_t andnot4(int32x4_t mask, int32x4_t x) { return vbicq_s32(x, mask); }
OB_INLINE float32x4_t clip4(float32x4_t x, float32x4_t limit) { return vmaxnmq_f32(vminnmq_f32(x, limit), vnegq_f32(limit)); }
OB_INLINE float32x4_t one_nan4(float32x4_t x) { return vbslq_f32(vceqq_f32(x, x), x, vreinterpretq_f32_u32(vdupq_n_u32(0x7FC00000u))); }
OB_INLINE int32x4_t set4(int32x4_t x, int32x4_t mask) { return as_signed(vtstq_s32(x, mask)); }

OB_INLINE vf vf_load(const float *p) { return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
OB_INLINE void vf_store(float *p, vf v) { vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b), vst1q_f32(p + 8, v.c), vst1q_f32(p + 12, v.d); }
OB_INLINE vf vf_set1(float x) { float32x4_t v = vdupq_n_f32(x); return (vf){v, v, v, v}; }
OB_INLINE vf vf_add(vf x, vf y) { return V2(vf, vaddq_f32, x, y); }
OB_INLINE vf vf_mul(vf x, vf y) { return V2(vf, vmulq_f32, x, y); }
OB_INLINE vf vf_min(vf x, vf y) { return V2(vf, vminnmq_f32, x, y); }
OB_INLINE vf vf_max(vf x, vf y) { return V2(vf, vmaxnmq_f32, x, y); }
OB_INLINE vf vf_clip(vf x, vf limit) { return V2(vf, clip4, x, limit); }
OB_INLINE vf vf_one_nan(vf x) { return V1(vf, one_nan4, x); }
OB_INLINE vf vf_bits(vi x) { return V1(vf, vreinterpretq_f32_s32, x); }
OB_INLINE vi vf_to_bits(vf x) { return V1(vi, vreinterpretq_s32_f32, x); }

OB_INLINE vi vi_load(const int32_t *p) { return (vi){vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
OB_INLINE void vi_store(int32_t *p, vi v) { vst1q_s32(p, v.a), vst1q_s32(p + 4, v.b), vst1q_s32(p + 8, v.c), vst1q_s32(p + 12, v.d); }
OB_INLINE vi vi_set1(int32_t x) { int32x4_t v = vdupq_n_s32(x); return (vi){v, v, v, v}; }
OB_INLINE vi vi_iota(void) { return (vi){{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}}; }
OB_INLINE vi vi_add(vi x, vi y) { return V2(vi, vaddq_s32, x, y); }
OB_INLINE vi vi_sub(vi x, vi y) { return V2(vi, vsubq_s32, x, y); }
OB_INLINE vi vi_mul(vi x, vi y) { return V2(vi, vmulq_s32, x, y); }
OB_INLINE vi vi_and(vi x, vi y) { return V2(vi, vandq_s32, x, y); }
OB_INLINE vi vi_andnot(vi mask, vi x) { return V2(vi, andnot4, mask, x); }
OB_INLINE vi vi_or(vi x, vi y) { return V2(vi, vorrq_s32, x, y); }
OB_INLINE vi vi_xor(vi x, vi y) { return V2(vi, veorq_s32, x, y); }
OB_INLINE vi vi_srl(vi x, int n) { return V2N(vi, srl4, x, n); }
OB_INLINE vi vi_sra(vi x, int n) { return V2N(vi, sra4, x, n); }
OB_INLINE vi vi_sll(vi x, int n) { return V2N(vi, sll4, x, n); }
OB_INLINE vi vi_srlv(vi x, vi n) { return V2(vi, srlv4, x, n); }
OB_INLINE vi vi_max(vi x, vi y) { return V2(vi, vmaxq_s32, x, y); }
OB_INLINE vf vi_to_f32(vi x) { return V1(vf, vcvtq_f32_s32, x); }
OB_INLINE vi vi_from_f32(vf x) { return V1(vi, vcvtq_s32_f32, x); }
OB_INLINE vi vi_rint(vf x) { return V1(vi, vcvtnq_s32_f32, x); }
OB_INLINE vi vi_floor(vf x) { return V1(vi, vcvtmq_s32_f32, x); }
OB_INLINE vf vf_add_uniform(vf v, vi r) { return vf_add(v, vf_mul(vi_to_f32(vi_srl(r, 8)), vf_set1(0x1p-24f))); }
OB_INLINE vi vi_add_where(vi sum, vi a, vi x, vi mask) { return vi_add(sum, vi_and(V2(vi, set4, x, mask), a)); }
OB_INLINE vi vi_sub_unless(vi sum, vi a, vi x, vi mask) { return vi_sub(sum, vi_andnot(V2(vi, set4, x, mask), a)); }
OB_INLINE int32_t vi_hmax(vi x) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.a, x.b), vmaxq_s32(x.c, x.d))); }
OB_INLINE int32_t vi_sum(vi x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }
/* clang-format on */

OB_INLINE float
vf_sum(vf x)
{
    float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

OB_INLINE void
vf_sum_pair(vf x, vf y, float *sum_x, float *sum_y)
{
    *sum_x = vf_sum(x);
    *sum_y = vf_sum(y);
}

OB_INLINE int64_t
vi_sum64(vi x, vi y)
{
    int64x2_t sum = vpaddlq_s32(x.a);
    sum = vpadalq_s32(vpadalq_s32(vpadalq_s32(sum, x.b), x.c), x.d);
    sum = vpadalq_s32(vpadalq_s32(vpadalq_s32(vpadalq_s32(sum, y.a), y.b), y.c), y.d);
    return vaddvq_s64(sum);
}

OB_INLINE vi
vi_load_i8(const int8_t *p)
{
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return (vi){vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))};
}

OB_INLINE vi
vi_load_u16(const uint16_t *p)
{
    uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return (vi){as_signed(vmovl_u16(vget_low_u16(low))), as_signed(vmovl_u16(vget_high_u16(low))),
                as_signed(vmovl_u16(vget_low_u16(high))),
                as_signed(vmovl_u16(vget_high_u16(high)))};
}

OB_INLINE void
vi_store_i8(int8_t *p, vi x)
{
    int16x8_t low = vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b));
    int16x8_t high = vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

OB_INLINE void
vi_store_u16(uint16_t *p, vi x)
{
    vst1q_u16(p, vreinterpretq_u16_s16(vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b))));
    vst1q_u16(p + 8, vreinterpretq_u16_s16(vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d))));
}

OB_INLINE void
v_add64(int8_t *e, const vi *d)
{
    const int8x16_t least = vdupq_n_s8(-127);
    for (size_t i = 0; i < 4; i++, e += 16, d++) {
        int16x8_t low = vcombine_s16(vqmovn_s32(d->a), vqmovn_s32(d->b));
        int16x8_t high = vcombine_s16(vqmovn_s32(d->c), vqmovn_s32(d->d));
        int8x16_t bytes = vmaxq_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)), least);
        vst1q_s8(e, vmaxq_s8(vqaddq_s8(vld1q_s8(e), bytes), least));
    }
}

OB_INLINE uint64_t
v_mask_beyond64(const int8_t *p)
{
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t set[4];
    for (size_t i = 0; i < 4; i++) {
        int8x16_t e = vld1q_s8(p + 16 * i);
        uint8x16_t beyond = vorrq_u8(vcgtq_s8(e, vdupq_n_s8(64)), vcltq_s8(e, vdupq_n_s8(-64)));
        set[i] = vandq_u8(beyond, bit);
    }
    uint8x16_t sum = vpaddq_u8(vpaddq_u8(set[0], set[1]), vpaddq_u8(set[2], set[3]));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sum, sum)), 0);
}

/* 16 x 16 bytes, rows of `in` at stride ld, to contiguous rows of `out` */
OB_INLINE void
v_transpose16(const int8_t *in, size_t ld, int8_t *out)
{
    int8x16_t r[16], t[16];
    for (size_t i = 0; i < 16; i++) {
        r[i] = vld1q_s8(in + i * ld);
    }
    for (unsigned round = 0; round < 4; round++) {
        for (size_t i = 0; i < 8; i++) {
            t[2 * i] = vzip1q_s8(r[i], r[i + 8]);
            t[2 * i + 1] = vzip2q_s8(r[i], r[i + 8]);
        }
        memcpy(r, t, sizeof r);
    }
    for (size_t i = 0; i < 16; i++) {
        vst1q_s8(out + 16 * i, r[i]);
    }
}

#endif
