// NEON with dot products of bytes (ARMv8.2): a vector is four registers, expansion is a byte shuffle by table.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "shuffles.h"

namespace {

struct Vec { uint8x16_t a, b, c, d; };
struct Floats { float32x4_t a, b, c, d; };
struct Ints { int32x4_t a, b, c, d; };

// act(register, ...) for each of the four.
template <class To, class Act, class... From>
inline To by_register(Act act, const From&... from) {
  return {act(from.a...), act(from.b...), act(from.c...), act(from.d...)};
}

inline Vec load(const uint8_t* at) { return {vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}; }
inline void store(uint8_t* at, const Vec& w) {
  vst1q_u8(at, w.a);
  vst1q_u8(at + 16, w.b);
  vst1q_u8(at + 32, w.c);
  vst1q_u8(at + 48, w.d);
}

// In byte i how many bits of the mask are in its bytes up to i: where the values of each byte begin and end.
inline uint64_t running_counts(uint64_t mask) {
  return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0) * 0x0101010101010101u;
}
inline uint8x16_t spread2(uint32_t bits, const uint8_t* values) {
  return vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kShuffles.spread2[bits]));
}
inline uint8x8_t spread1(uint64_t bits, const uint8_t* values) {
  return vtbl1_u8(vld1_u8(values), vld1_u8(kShuffles.spread1[bits]));
}
inline Vec expand2(uint32_t mask, const uint8_t* values) {
  const auto before = static_cast<uint32_t>(running_counts(mask));
  return {spread2(mask & 255, values), spread2(mask >> 8 & 255, values + 2 * (before & 255)),
          spread2(mask >> 16 & 255, values + 2 * (before >> 8 & 255)),
          spread2(mask >> 24, values + 2 * (before >> 16 & 255))};
}
inline Vec expand4(uint64_t mask, const uint8_t* values) {
  const uint64_t before = running_counts(mask) << 8;
  const auto pair = [&](int first) {
    const uint8_t *low = values + (before >> first & 255), *high = values + (before >> (first + 8) & 255);
    return vcombine_u8(spread1(mask >> first & 255, low), spread1(mask >> (first + 8) & 255, high));
  };
  return {pair(0), pair(16), pair(32), pair(48)};
}

inline uint32_t nonzero8(uint16x8_t v) {  // -0.0 counts as zero
  const uint16_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  return vaddvq_u16(vandq_u16(vtstq_u16(v, vdupq_n_u16(0x7fff)), vld1q_u16(bits)));
}
inline uint32_t nonzero16(uint8x16_t v) {
  const uint8_t bits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t each = vandq_u8(vtstq_u8(v, v), vld1q_u8(bits));
  return vaddv_u8(vget_low_u8(each)) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(each))) << 8;
}
inline uint32_t nonzero2(const Vec& w) {
  return nonzero8(vreinterpretq_u16_u8(w.a)) | nonzero8(vreinterpretq_u16_u8(w.b)) << 8 |
         nonzero8(vreinterpretq_u16_u8(w.c)) << 16 | nonzero8(vreinterpretq_u16_u8(w.d)) << 24;
}
inline uint64_t nonzero4(const Vec& w) {
  const uint64_t high = nonzero16(w.c) | nonzero16(w.d) << 16;
  return high << 32 | nonzero16(w.a) | nonzero16(w.b) << 16;
}
inline void compress2(uint8_t* at, uint32_t mask, const Vec& w) {
  uint8_t all[64];
  store(all, w);
  for (int part = 0; part < 4; ++part) {
    const uint32_t bits = mask >> 8 * part & 255;
    vst1q_u8(at, vqtbl1q_u8(vld1q_u8(all + 16 * part), vld1q_u8(kShuffles.gather2[bits])));
    at += 2 * __builtin_popcount(bits);
  }
}
inline void compress4(uint8_t* at, uint64_t mask, const Vec& w) {
  uint8_t all[64];
  store(all, w);
  for (int part = 0; part < 8; ++part) {
    const uint32_t bits = mask >> 8 * part & 255;
    vst1_u8(at, vtbl1_u8(vld1_u8(all + 8 * part), vld1_u8(kShuffles.gather1[bits])));
    at += __builtin_popcount(bits);
  }
}

inline Floats all(float value) {
  const float32x4_t v = vdupq_n_f32(value);
  return {v, v, v, v};
}
inline Ints same(int32_t value) {
  const int32x4_t v = vdupq_n_s32(value);
  return {v, v, v, v};
}
inline Floats no_floats() { return all(0); }
inline Ints no_ints() { return same(0); }
inline Floats plus(const Floats& x, const Floats& y) {
  return by_register<Floats>([](float32x4_t p, float32x4_t q) { return vaddq_f32(p, q); }, x, y);
}
inline Ints plus(const Ints& x, const Ints& y) {
  return by_register<Ints>([](int32x4_t p, int32x4_t q) { return vaddq_s32(p, q); }, x, y);
}
inline Ints minus(const Ints& x, const Ints& y) {
  return by_register<Ints>([](int32x4_t p, int32x4_t q) { return vsubq_s32(p, q); }, x, y);
}
inline Floats times(const Floats& x, const Floats& y) {
  return by_register<Floats>([](float32x4_t p, float32x4_t q) { return vmulq_f32(p, q); }, x, y);
}
inline void store(float* at, const Floats& x) {
  vst1q_f32(at, x.a);
  vst1q_f32(at + 4, x.b);
  vst1q_f32(at + 8, x.c);
  vst1q_f32(at + 12, x.d);
}
inline void store(int32_t* at, const Ints& x) {
  vst1q_s32(at, x.a);
  vst1q_s32(at + 4, x.b);
  vst1q_s32(at + 8, x.c);
  vst1q_s32(at + 12, x.d);
}
inline Floats load_floats(const float* at) {
  return {vld1q_f32(at), vld1q_f32(at + 4), vld1q_f32(at + 8), vld1q_f32(at + 12)};
}
inline Ints load_ints(const int32_t* at) {
  return {vld1q_s32(at), vld1q_s32(at + 4), vld1q_s32(at + 8), vld1q_s32(at + 12)};
}
inline Floats to_floats(const Ints& x) {
  return by_register<Floats>([](int32x4_t p) { return vcvtq_f32_s32(p); }, x);
}
inline float32x4_t greater(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(y, x), y, x); }
inline Floats greater(const Floats& x, const Floats& y) {  // x where it is NaN
  return by_register<Floats>([](float32x4_t p, float32x4_t q) { return greater(p, q); }, x, y);
}
inline float32x4_t greatest(const Floats& x) { return greater(greater(x.a, x.b), greater(x.c, x.d)); }
inline bool any_above(const Floats& x, float bound) {
  const auto above = [&](float32x4_t v) { return vcgtq_f32(v, vdupq_n_f32(bound)); };
  return vmaxvq_u32(vorrq_u32(vorrq_u32(above(x.a), above(x.b)), vorrq_u32(above(x.c), above(x.d)))) != 0;
}
inline float top(const Floats& x) {
  float each[4];
  vst1q_f32(each, greatest(x));
  float most = each[0];
  for (float v : each) most = v > most ? v : most;
  return most;
}
inline float total(const Floats& x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d))); }
inline Floats power2(const Floats& whole) {
  return by_register<Floats>(
      [](float32x4_t v) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(127)), 23));
      },
      whole);
}
inline float32x4_t widened(uint16x4_t halves) { return vreinterpretq_f32_u32(vshll_n_u16(halves, 16)); }
inline Floats load_halves(const uint16_t* at) {
  return {widened(vld1_u16(at)), widened(vld1_u16(at + 4)), widened(vld1_u16(at + 8)), widened(vld1_u16(at + 12))};
}
// To nearest, ties to even, as `to_bf16`.
inline uint16x4_t rounded(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), up, quiet), 16);
}
inline void store_halves(uint16_t* at, const Floats& x) {
  vst1_u16(at, rounded(x.a));
  vst1_u16(at + 4, rounded(x.b));
  vst1_u16(at + 8, rounded(x.c));
  vst1_u16(at + 12, rounded(x.d));
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void dot2(Floats& sum, const Vec& w, uint32_t x) {
  const float even = as_float(x << 16), odd = as_float(x & 0xffff0000u);
  sum = by_register<Floats>(
      [&](float32x4_t own, uint8x16_t bytes) {
        const uint32x4_t pairs = vreinterpretq_u32_u8(bytes);
        own = vfmaq_n_f32(own, vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)), even);
        return vfmaq_n_f32(own, vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u))), odd);
      },
      sum, w);
}

// Bytes of x have signs, as those of weights have: the instruction for others (USDOT) is of ARMv8.6.
constexpr int kZeroByte = 0;
inline void dot4(Ints& sum, const Vec& w, uint32_t x) {
  const int8x16_t many = vreinterpretq_s8_u32(vdupq_n_u32(x));
  sum = by_register<Ints>(
      [&](int32x4_t own, uint8x16_t bytes) { return vdotq_s32(own, vreinterpretq_s8_u8(bytes), many); }, sum, w);
}

// Signed bytes, four of a lane, meet as many numbers of 16 bits, whose upper and lower bytes are a word each.
constexpr bool kSplitShorts = true;
constexpr int32_t kBytesGain = 0;
using Bytes = Vec;
inline Bytes load_bytes(const uint8_t* at) { return load(at); }
inline void dot_short(Ints (&sums)[2], const Bytes& w, const uint32_t (&x)[2]) {
  dot4(sums[0], w, x[0]);
  dot4(sums[1], w, x[1]);
}
inline Ints joined(const Ints (&sums)[2]) {
  return by_register<Ints>([](int32x4_t p, int32x4_t q) { return vaddq_s32(vshlq_n_s32(p, 8), q); }, sums[0], sums[1]);
}

inline Floats rounded_once(const Floats& x, const Floats& y, const Floats& sum) {
  return by_register<Floats>([](float32x4_t p, float32x4_t q, float32x4_t r) { return vfmaq_f32(r, p, q); }, x, y, sum);
}
// a * b + sum, rounded as often as is fastest at this level.
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& sum) { return rounded_once(a, b, sum); }
inline Vec low_halves(const Vec& w) {
  return by_register<Vec>([](uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }, w);
}
inline Vec high_halves(const Vec& w) {
  return by_register<Vec>([](uint8x16_t v) { return vshrq_n_u8(v, 4); }, w);
}
inline Ints load_zeros(const uint8_t* at) {
  const uint8x8_t both = vld1_u8(at);
  const uint16x8_t low = vmovl_u8(vand_u8(both, vdup_n_u8(15))), high = vmovl_u8(vshr_n_u8(both, 4));
  const auto wide = [](uint16x4_t v) { return vreinterpretq_s32_u32(vmovl_u16(v)); };
  return {wide(vget_low_u16(low)), wide(vget_high_u16(low)), wide(vget_low_u16(high)), wide(vget_high_u16(high))};
}
inline Ints times_short(const Ints& x, uint32_t y) {
  const int32_t factor = static_cast<int16_t>(y);
  return by_register<Ints>([&](int32x4_t v) { return vmulq_n_s32(v, factor); }, x);
}
inline Vec minus_zeros(const Vec& codes, const Ints& zeros) {
  return by_register<Vec>(
      [](uint8x16_t v, int32x4_t zero) {
        return vsubq_u8(v, vreinterpretq_u8_s32(vmulq_n_s32(zero, 0x01010101)));
      },
      codes, zeros);
}
// Codes reach 15, so their sign is no matter.
inline void dot_codes(Ints& sum, const Vec& codes, uint32_t x) { dot4(sum, codes, x); }

constexpr int kGemmRows = 4, kGemmBlocks = 1;  // 16 registers of sums, 8 of halves of weights, 2 of x
constexpr int kSums = 4;

}  // namespace
