// AVX2 with FMA: a vector is two registers, expansion is a byte shuffle by table.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "shuffles.h"

namespace {

struct Vec { __m256i a, b; };
struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };

inline __m256i load32(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline void store32(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }
inline Vec load(const uint8_t* at) { return {load32(at), load32(at + 32)}; }
inline void store(uint8_t* at, Vec w) {
  store32(at, w.a);
  store32(at + 32, w.b);
}

inline __m128i load16(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
inline __m128i load8(const void* at) { return _mm_loadl_epi64(static_cast<const __m128i*>(at)); }

// 8 elements of 16 bits for 8 bits of the mask, from values that are consumed.
inline __m128i spread2(uint32_t bits, const uint8_t*& values) {
  const __m128i found = _mm_shuffle_epi8(load16(values), load16(kShuffles.spread2[bits]));
  values += 2 * __builtin_popcount(bits);
  return found;
}
inline __m128i spread1(uint32_t bits, const uint8_t*& values) {
  const __m128i found = _mm_shuffle_epi8(load8(values), load8(kShuffles.spread1[bits]));
  values += __builtin_popcount(bits);
  return found;
}
inline Vec expand2(uint32_t mask, const uint8_t* values) {
  const __m128i p = spread2(mask & 255, values), q = spread2(mask >> 8 & 255, values);
  const __m128i r = spread2(mask >> 16 & 255, values), s = spread2(mask >> 24, values);
  return {_mm256_set_m128i(q, p), _mm256_set_m128i(s, r)};
}
inline __m128i spread16(uint32_t bits, const uint8_t*& values) {
  const __m128i low = spread1(bits & 255, values);
  return _mm_unpacklo_epi64(low, spread1(bits >> 8 & 255, values));
}
inline Vec expand4(uint64_t mask, const uint8_t* values) {
  const __m128i p = spread16(mask & 0xffff, values), q = spread16(mask >> 16 & 0xffff, values);
  const __m128i r = spread16(mask >> 32 & 0xffff, values), s = spread16(mask >> 48, values);
  return {_mm256_set_m128i(q, p), _mm256_set_m128i(s, r)};
}

inline uint32_t nonzero16(__m256i v) {
  const __m256i zero = _mm256_cmpeq_epi16(_mm256_slli_epi16(v, 1), _mm256_setzero_si256());
  return ~_pext_u32(static_cast<uint32_t>(_mm256_movemask_epi8(zero)), 0x55555555u) & 0xffff;
}
inline uint64_t nonzero8(__m256i v) {
  const __m256i zero = _mm256_cmpeq_epi8(v, _mm256_setzero_si256());
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(zero));
}
inline uint32_t nonzero2(Vec w) { return nonzero16(w.a) | nonzero16(w.b) << 16; }
inline uint64_t nonzero4(Vec w) { return nonzero8(w.a) | nonzero8(w.b) << 32; }

inline void compress2(uint8_t* at, uint32_t mask, Vec w) {
  uint8_t all[64];
  store(all, w);
  for (int part = 0; part < 4; ++part) {
    const uint32_t bits = mask >> 8 * part & 255;
    const __m128i found = _mm_shuffle_epi8(load16(all + 16 * part), load16(kShuffles.gather2[bits]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), found);
    at += 2 * __builtin_popcount(bits);
  }
}
inline void compress4(uint8_t* at, uint64_t mask, Vec w) {
  uint8_t all[64];
  store(all, w);
  for (int part = 0; part < 8; ++part) {
    const uint32_t bits = mask >> 8 * part & 255;
    const __m128i found = _mm_shuffle_epi8(load8(all + 8 * part), load8(kShuffles.gather1[bits]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), found);
    at += __builtin_popcount(bits);
  }
}

inline Floats no_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats plus(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Ints plus(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline void store(float* at, Floats x) {
  _mm256_storeu_ps(at, x.a);
  _mm256_storeu_ps(at + 8, x.b);
}
inline void store(int32_t* at, Ints x) {
  store32(at, x.a);
  store32(at + 8, x.b);
}
inline Floats load_floats(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline Ints load_ints(const int32_t* at) {
  return {load32(reinterpret_cast<const uint8_t*>(at)), load32(reinterpret_cast<const uint8_t*>(at + 8))};
}

inline Ints minus(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Floats times(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Floats greater(Floats x, Floats y) { return {_mm256_max_ps(y.a, x.a), _mm256_max_ps(y.b, x.b)}; }
inline bool any_above(Floats x, float bound) {
  const __m256 many = _mm256_set1_ps(bound);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, many, _CMP_GT_OQ),
                                         _mm256_cmp_ps(x.b, many, _CMP_GT_OQ))) != 0;
}
inline float top(Floats x) {
  float each[8];
  _mm256_storeu_ps(each, _mm256_max_ps(x.a, x.b));
  float found = each[0];
  for (float v : each) found = v > found ? v : found;
  return found;
}
inline float total(Floats x) {
  float each[8], sum = 0;
  _mm256_storeu_ps(each, _mm256_add_ps(x.a, x.b));
  for (float v : each) sum += v;
  return sum;
}
inline __m256 power2(__m256 whole) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Floats power2(Floats whole) { return {power2(whole.a), power2(whole.b)}; }
inline __m256 widened(const uint16_t* at) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(at)), 16));
}
inline Floats load_halves(const uint16_t* at) { return {widened(at), widened(at + 8)}; }
inline __m256i rounded(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
  const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
}
// To nearest, ties to even, as `to_bf16`.
inline void store_halves(uint16_t* at, Floats x) {
  store32(at, _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(x.a), rounded(x.b)), 0xd8));
}

inline __m256 dot2(__m256 sum, __m256i w, __m256i x) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
                        _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), sum);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)),
                         _mm256_castsi256_ps(_mm256_and_si256(x, high)), sum);
}
inline void dot2(Floats& sum, Vec w, uint32_t x) {
  const __m256i both = _mm256_set1_epi32(static_cast<int>(x));
  sum.a = dot2(sum.a, w.a, both);
  sum.b = dot2(sum.b, w.b, both);
}

// Bytes of x have no sign: a code of zero is 128.
constexpr int kZeroByte = 128;
// vpmaddubsw would saturate: 255 * 127 * 2 does not fit int16. So bytes are widened first.
inline __m256i products(__m128i w, __m128i x) {
  return _mm256_madd_epi16(_mm256_cvtepi8_epi16(w), _mm256_cvtepu8_epi16(x));
}
inline __m256i dot4(__m256i sum, __m256i w, __m128i x) {
  const __m256i low = products(_mm256_castsi256_si128(w), x);
  const __m256i high = products(_mm256_extracti128_si256(w, 1), x);
  const __m256i pairs = _mm256_hadd_epi32(low, high);  // 0 1 4 5 | 2 3 6 7
  return _mm256_add_epi32(sum, _mm256_permute4x64_epi64(pairs, 0xd8));
}
inline void dot4(Ints& sum, Vec w, uint32_t x) {
  const __m128i many = _mm_set1_epi32(static_cast<int>(x));
  sum.a = dot4(sum.a, w.a, many);
  sum.b = dot4(sum.b, w.b, many);
}

// Signed bytes, four of a lane, meet as many numbers of 16 bits: two words, of the first and third and of the second
// and fourth.
constexpr bool kSplitShorts = false;
constexpr int32_t kBytesGain = 0;
struct Bytes { Vec even, odd; };
inline __m256i even_bytes(__m256i w) { return _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8); }
inline Bytes load_bytes(const uint8_t* at) {
  const Vec w = load(at);
  return {{even_bytes(w.a), even_bytes(w.b)}, {_mm256_srai_epi16(w.a, 8), _mm256_srai_epi16(w.b, 8)}};
}
inline void dot_short(Ints (&sums)[2], const Bytes& w, const uint32_t (&x)[2]) {
  const __m256i even = _mm256_set1_epi32(static_cast<int>(x[0])), odd = _mm256_set1_epi32(static_cast<int>(x[1]));
  for (int i = 0; i < 2; ++i) {
    const Vec& own = i ? w.odd : w.even;
    const __m256i many = i ? odd : even;
    sums[0].a = _mm256_add_epi32(sums[0].a, _mm256_madd_epi16(own.a, many));
    sums[0].b = _mm256_add_epi32(sums[0].b, _mm256_madd_epi16(own.b, many));
  }
}
inline Ints joined(const Ints (&sums)[2]) { return sums[0]; }

inline Floats rounded_once(Floats x, Floats y, Floats sum) {
  return {_mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b)};
}
// a * b + sum, rounded as often as is fastest at this level.
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return rounded_once(a, b, sum); }
inline __m256i low_halves(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Vec low_halves(Vec w) { return {low_halves(w.a), low_halves(w.b)}; }
inline Vec high_halves(Vec w) {
  return {low_halves(_mm256_srli_epi16(w.a, 4)), low_halves(_mm256_srli_epi16(w.b, 4))};
}
inline Ints same(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Ints load_zeros(const uint8_t* at) {
  const __m128i all = load8(at), low = _mm_set1_epi8(15);
  return {_mm256_cvtepu8_epi32(_mm_and_si128(all, low)),
          _mm256_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(all, 4), low))};
}
inline Ints times_short(Ints x, uint32_t y) {
  const __m256i many = _mm256_set1_epi32(static_cast<int>(y));
  return {_mm256_madd_epi16(x.a, many), _mm256_madd_epi16(x.b, many)};
}
inline __m256i minus_zeros(__m256i codes, __m256i zeros) {
  return _mm256_sub_epi8(codes, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(0x01010101)));
}
inline Vec minus_zeros(Vec codes, Ints zeros) {
  return {minus_zeros(codes.a, zeros.a), minus_zeros(codes.b, zeros.b)};
}
// Codes reach 15, so two products fit int16.
inline __m256i dot_codes(__m256i sum, __m256i codes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline void dot_codes(Ints& sum, Vec codes, uint32_t x) {
  const __m256i many = _mm256_set1_epi32(static_cast<int>(x));
  sum.a = dot_codes(sum.a, codes.a, many);
  sum.b = dot_codes(sum.b, codes.b, many);
}

constexpr int kGemmRows = 3, kGemmBlocks = 1;  // 6 registers of sums, 4 of halves of weights, 2 of x
constexpr int kSums = 8;

}  // namespace
