// AVX-512 with VBMI2; BF16 and VNNI where this compilation has them.
#pragma once
#include <immintrin.h>

namespace {

struct Vec { __m512i v; };
struct Floats { __m512 v; };
struct Ints { __m512i v; };

inline Vec load(const uint8_t* at) { return {_mm512_loadu_si512(at)}; }
inline void store(uint8_t* at, Vec w) { _mm512_storeu_si512(at, w.v); }

// vpexpand depends on the old content of its destination, even with zero masking (Zen 4, Zen 5): a compiler
// that reuses one register serialises the loop. Zeroing it first costs nothing and made it 2.1 times as fast.
// The register form is used because a memory operand gains nothing and an emulator has it wrong.
inline Vec expand2(uint32_t mask, const uint8_t* values) {
  const __m512i packed = _mm512_loadu_si512(values);
  __m512i wide;
  __asm__("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}%{z%}"
          : "=&v"(wide)
          : "v"(packed), "Yk"(static_cast<__mmask32>(mask)));
  return {wide};
}
inline Vec expand4(uint64_t mask, const uint8_t* values) {
  const __m512i packed = _mm512_loadu_si512(values);
  __m512i wide;
  __asm__("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}%{z%}"
          : "=&v"(wide)
          : "v"(packed), "Yk"(static_cast<__mmask64>(mask)));
  return {wide};
}

// The 16-bit (8-bit) elements that are not zero; -0.0 counts as zero.
inline uint32_t nonzero2(Vec w) { return _mm512_test_epi16_mask(w.v, _mm512_set1_epi16(0x7fff)); }
inline uint64_t nonzero4(Vec w) { return _mm512_test_epi8_mask(w.v, w.v); }
// May write 64 bytes; the elements of `mask` come first.
inline void compress2(uint8_t* at, uint32_t mask, Vec w) {
  _mm512_storeu_si512(at, _mm512_maskz_compress_epi16(mask, w.v));
}
inline void compress4(uint8_t* at, uint64_t mask, Vec w) {
  _mm512_storeu_si512(at, _mm512_maskz_compress_epi8(mask, w.v));
}

inline Floats no_floats() { return {_mm512_setzero_ps()}; }
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Floats plus(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Ints plus(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline void store(float* at, Floats a) { _mm512_storeu_ps(at, a.v); }
inline void store(int32_t* at, Ints a) { _mm512_storeu_si512(at, a.v); }
inline Floats load_floats(const float* at) { return {_mm512_loadu_ps(at)}; }
inline Ints load_ints(const int32_t* at) { return {_mm512_loadu_si512(at)}; }

inline Ints minus(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Floats times(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats all(float value) { return {_mm512_set1_ps(value)}; }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Floats greater(Floats a, Floats b) { return {_mm512_max_ps(b.v, a.v)}; }  // a where it is NaN
inline bool any_above(Floats a, float bound) {
  return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
}
inline float top(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline float total(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline Floats power2(Floats whole) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(whole.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline Floats load_halves(const uint16_t* at) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
// To nearest, ties to even, as `to_bf16`; vcvtneps2bf16 would flush the smallest numbers to zero.
inline void store_halves(uint16_t* at, Floats a) {
  const __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), halves);
}

// sum += w * x, x the two bfloat16 of one group.
#if defined(__AVX512BF16__)
// A line of int4 codes as 4 vectors of bfloat16, two inputs of 16 outputs each: scale * (128 + code) - minus, where
// 128 + code is a code in the upper bits of a float32's fraction.
inline void codes_to_halves(const uint8_t* line, Floats scale, Floats minus, uint8_t* into) {
  const __m512i codes = _mm512_loadu_si512(line), mask = _mm512_set1_epi32(0xf << 16), base = _mm512_set1_epi32(0x43000000);
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto weight = [&](__m512i at_16) {
    const __m512 shifted = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(at_16, mask, base, 0xea));  // at_16 & mask | base
    return _mm512_fmsub_ps(shifted, scale.v, minus.v);
  };
  const auto pair = [&](__m512i first, __m512i second, int vector) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weight(second), weight(first)));
    _mm512_storeu_si512(into + 64 * vector, _mm512_permutexvar_epi16(pairs, both));
  };
  pair(_mm512_slli_epi32(codes, 16), _mm512_slli_epi32(codes, 8), 0);
  pair(codes, _mm512_srli_epi32(codes, 8), 1);
  pair(_mm512_slli_epi32(codes, 12), _mm512_slli_epi32(codes, 4), 2);
  pair(_mm512_srli_epi32(codes, 4), _mm512_srli_epi32(codes, 12), 3);
}

// 32 numbers, none of them so small that it would be flushed to zero.
inline void store_normal_halves(uint16_t* at, Floats a, Floats b) {
  _mm512_storeu_si512(at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}
inline void dot2(Floats& sum, Vec w, uint32_t x) {
  sum.v = _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(w.v),
                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))));
}
#else
inline void dot2(Floats& sum, Vec w, uint32_t x) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i both = _mm512_set1_epi32(static_cast<int>(x));
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w.v, high));
  sum.v = _mm512_fmadd_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), sum.v);
  sum.v = _mm512_fmadd_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(both, high)), sum.v);
}
#endif

// sum += w * x, x the four unsigned bytes of one group, w signed. A code of zero is 128.
constexpr int kZeroByte = 128;
#if defined(__AVX512VNNI__)
inline void dot4(Ints& sum, Vec w, uint32_t x) {
  sum.v = _mm512_dpbusd_epi32(sum.v, _mm512_set1_epi32(static_cast<int>(x)), w.v);
}
#else
// vpmaddubsw would saturate: 255 * 127 * 2 does not fit int16. So bytes are widened first.
inline __m512i products(__m256i w, __m256i x) {
  return _mm512_madd_epi16(_mm512_cvtepi8_epi16(w), _mm512_cvtepu8_epi16(x));
}
inline void dot4(Ints& sum, Vec w, uint32_t x) {
  const __m256i many = _mm256_set1_epi32(static_cast<int>(x));
  const __m512i low = products(_mm512_castsi512_si256(w.v), many);
  const __m512i high = products(_mm512_extracti64x4_epi64(w.v, 1), many);
  const __m512i order = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i next = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  sum.v = _mm512_add_epi32(sum.v, _mm512_permutex2var_epi32(low, order, high));
  sum.v = _mm512_add_epi32(sum.v, _mm512_permutex2var_epi32(low, next, high));
}
#endif

// Signed bytes, four of a lane, meet as many numbers of 16 bits.
#if defined(__AVX512VNNI__)
// Their upper and lower bytes are a word each. Products are of unsigned bytes, so w gets 128 more, and sums too much by
// 128 times the sum of x.
constexpr bool kSplitShorts = true;
constexpr int32_t kBytesGain = 128;
struct Bytes { __m512i v; };
inline Bytes load_bytes(const uint8_t* at) {
  return {_mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(static_cast<char>(0x80)))};
}
inline void dot_short(Ints (&sums)[2], Bytes w, const uint32_t (&x)[2]) {
  sums[0].v = _mm512_dpbusd_epi32(sums[0].v, w.v, _mm512_set1_epi32(static_cast<int>(x[0])));
  sums[1].v = _mm512_dpbusd_epi32(sums[1].v, w.v, _mm512_set1_epi32(static_cast<int>(x[1])));
}
inline Ints joined(const Ints (&sums)[2]) { return {_mm512_add_epi32(_mm512_slli_epi32(sums[0].v, 8), sums[1].v)}; }
#else
// Two words: the first and third, the second and fourth.
constexpr bool kSplitShorts = false;
constexpr int32_t kBytesGain = 0;
struct Bytes { __m512i even, odd; };
inline Bytes load_bytes(const uint8_t* at) {
  const __m512i w = _mm512_loadu_si512(at);
  return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
}
inline void dot_short(Ints (&sums)[2], Bytes w, const uint32_t (&x)[2]) {
  const __m512i even = _mm512_madd_epi16(w.even, _mm512_set1_epi32(static_cast<int>(x[0])));
  const __m512i odd = _mm512_madd_epi16(w.odd, _mm512_set1_epi32(static_cast<int>(x[1])));
  sums[0].v = _mm512_add_epi32(sums[0].v, even);
  sums[1].v = _mm512_add_epi32(sums[1].v, odd);
}
inline Ints joined(const Ints (&sums)[2]) { return plus(sums[0], sums[1]); }
#endif

inline Ints larger_magnitude(Ints bits, Floats a) {  // as integers magnitudes have an order, NaN the last
  const __m512i own = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_max_epi32(bits.v, own)};
}
inline int32_t top(Ints a) { return _mm512_reduce_max_epi32(a.v); }
inline int32_t total(Ints a) { return _mm512_reduce_add_epi32(a.v); }
inline Ints nearest(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // ties to even
inline void store_bytes(uint8_t* at, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(a.v));
}

#if defined(__AVX512VNNI__)
// Codes of 32 numbers, less than 2**15 - 128 each way, as the words that `dot_short` takes: [byte][four numbers].
inline void store_shorts(uint32_t (&words)[2][8], Ints first, Ints second) {
  auto* high = reinterpret_cast<uint8_t*>(words[0]);
  auto* low = reinterpret_cast<uint8_t*>(words[1]);
  const __m512i half = _mm512_set1_epi32(128);
  store_bytes(high, {_mm512_srai_epi32(_mm512_add_epi32(first.v, half), 8)});
  store_bytes(high + 16, {_mm512_srai_epi32(_mm512_add_epi32(second.v, half), 8)});
  store_bytes(low, first);
  store_bytes(low + 16, second);
}
#endif

inline Floats rounded_once(Floats a, Floats b, Floats sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
// a * b + sum, rounded as often as is fastest at this level.
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return rounded_once(a, b, sum); }
inline Vec low_halves(Vec w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
inline Vec high_halves(Vec w) { return low_halves({_mm512_srli_epi16(w.v, 4)}); }
inline Ints same(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline Ints load_zeros(const uint8_t* at) {
  const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)), low = _mm_set1_epi8(15);
  const __m128i halves = _mm_unpacklo_epi64(_mm_and_si128(all, low), _mm_and_si128(_mm_srli_epi16(all, 4), low));
  return {_mm512_cvtepu8_epi32(halves)};
}
inline Ints times_short(Ints a, uint32_t x) {
  return {_mm512_madd_epi16(a.v, _mm512_set1_epi32(static_cast<int>(x)))};
}
inline Vec minus_zeros(Vec codes, Ints zeros) {
  return {_mm512_sub_epi8(codes.v, _mm512_mullo_epi32(zeros.v, _mm512_set1_epi32(0x01010101)))};
}
// sum += codes * x, codes 0..15 and x four signed bytes.
inline void dot_codes(Ints& sum, Vec codes, uint32_t x) {
  const __m512i many = _mm512_set1_epi32(static_cast<int>(x));
#if defined(__AVX512VNNI__)
  sum.v = _mm512_dpbusd_epi32(sum.v, codes.v, many);
#else  // codes reach 15, so two products fit int16
  const __m512i pairs = _mm512_maddubs_epi16(codes.v, many);
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

constexpr int kGemmRows = 6, kGemmBlocks = 4;  // 24 sums, 4 vectors of weights and a broadcast: 29 registers
constexpr int kSums = 16;

}  // namespace
