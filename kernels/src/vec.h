// 64-byte vectors of packed weights and what kernels do with them, at the level of this compilation.
//
// A `Vec` holds, for 16 outputs, the weights of one group of inputs: 2 of bfloat16 or 4 of int8 per lane.
// `Floats` and `Ints` are the 16 running sums; `kSums` of them stay in registers beside what they are made of.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// Whether this compilation multiplies tiles: those of AMX, or their model.
#define EFFC_TILES (EFFC_LEVEL == 4 || EFFC_LEVEL == 5)

namespace {

inline void ahead(const void* at) { __builtin_prefetch(at); }
inline void far_ahead(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }  // no nearer than the second cache

// What follows reads `value` from memory: a compiler would cut a vector that it has just stored into words again.
template <class T>
inline void keep_in_memory(T& value) {
  __asm__ volatile("" : "+m"(value));
}

inline uint32_t word(const void* at) {
  uint32_t value;
  std::memcpy(&value, at, 4);
  return value;
}

inline uint64_t wide(const void* at) {
  uint64_t value;
  std::memcpy(&value, at, 8);
  return value;
}

inline float from_bf16(uint16_t bits) {
  const uint32_t whole = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &whole, 4);
  return value;
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, quiet = bits >> 16 | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

}  // namespace

#if defined(__AVX512VBMI2__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif

#if !defined(__AVX512BF16__)
namespace {

// A line of int4 codes as 4 vectors of bfloat16, two inputs of 16 outputs each: scale * (128 + code) - minus.
inline void codes_to_halves(const uint8_t* line, const Floats& scale, const Floats& minus, uint8_t* into) {
  float scales[16], less[16];
  store(scales, scale);
  store(less, minus);
  for (int lane = 0; lane < 16; ++lane)
    for (int i = 0; i < 8; ++i) {
      const int code = line[4 * lane + i % 4] >> (i < 4 ? 0 : 4) & 15;
      const uint16_t half = to_bf16(std::fma(scales[lane], static_cast<float>(128 + code), -less[lane]));
      std::memcpy(into + i / 2 * 64 + 4 * lane + i % 2 * 2, &half, 2);
    }
}

inline void store_normal_halves(uint16_t* at, const Floats& a, const Floats& b) {
  store_halves(at, a);
  store_halves(at + 16, b);
}

}  // namespace
#endif
