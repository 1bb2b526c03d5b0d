// The arithmetics of the linear kernels: bfloat16 with float32 sums; int8 with exact int32 sums, and inputs of one byte
// or of two.
#pragma once
#include <algorithm>

#include "packed.h"
#include "vec.h"

namespace {

inline float element(const void* x, int32_t x_float, int64_t at) {
  return x_float ? static_cast<const float*>(x)[at] : from_bf16(static_cast<const uint16_t*>(x)[at]);
}

// Smaller magnitudes count as zero: one over them is not a finite number.
constexpr float kLeast = 1e-30f;

// The largest magnitude of `count` numbers; NaN where one is inf or NaN. By their bits, as integers have an
// order that a compiler may vectorise.
inline float largest(const void* x, int32_t x_float, int64_t at, int64_t count) {
  uint32_t most = 0;
  if (x_float)
    for (int64_t i = 0; i < count; ++i)
      most = std::max(most, word(static_cast<const float*>(x) + at + i) & 0x7fffffffu);
  else
    for (int64_t i = 0; i < count; ++i)
      most = std::max(most, static_cast<uint32_t>(static_cast<const uint16_t*>(x)[at + i] & 0x7fff) << 16);
  float value;
  std::memcpy(&value, &most, 4);
  return value - value == 0 ? value : value - value;
}

// Codes round(x * inverse) + zero. Adding 1.5 * 2**23 rounds to nearest even and leaves it in the low bits.
inline void codes(const void* x, int32_t x_float, int64_t at, int64_t count, float inverse, int zero,
                  uint8_t* into) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = element(x, x_float, at + i) * inverse + 12582912.0f;
    into[i] = static_cast<uint8_t>(word(&shifted) + zero);
  }
}

// Codes round(x * inverse) of 16 bits, less than 2**15 - 128 each way, as their upper and lower bytes: a code is
// 256 * (high - 128) + low - 128.
inline void halves(const void* x, int32_t x_float, int64_t at, int64_t count, float inverse, uint8_t* high,
                   uint8_t* low) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = element(x, x_float, at + i) * inverse + 12582912.0f;
    const uint32_t code = word(&shifted) + 0x8080;
    high[i] = static_cast<uint8_t>(code >> 8);
    low[i] = static_cast<uint8_t>(code);
  }
}

struct Bf16 {
  using Sum = Floats;
  static constexpr int kLines = 1;  // rows of bytes that a row of x becomes; each has a sum of its own
  static constexpr bool kGrouped = false;  // whether inputs in groups have scales of their own
  static constexpr int kWidth = 2;  // bytes of a weight
  static constexpr int64_t kTilesFrom = 1;  // rows that tiles multiply, where there are any
  static Sum none() { return no_floats(); }
  static void dot(Sum& sum, Vec w, uint32_t x) { dot2(sum, w, x); }
  static Sum load_sum(const uint8_t* at) { return load_floats(reinterpret_cast<const float*>(at)); }
  static void store_sum(uint8_t* at, Sum sum) { store(reinterpret_cast<float*>(at), sum); }

  // One row as bfloat16, zeros behind it. Returns its scale.
  static float prepare(const void* x, int32_t x_float, int64_t at, int64_t k, uint8_t* into, int64_t bytes) {
    auto* row = reinterpret_cast<uint16_t*>(into);
    if (x_float)
      for (int64_t i = 0; i < k; ++i) row[i] = to_bf16(static_cast<const float*>(x)[at + i]);
    else
      std::memcpy(row, static_cast<const uint16_t*>(x) + at, 2 * k);
    std::memset(into + 2 * k, 0, bytes - 2 * k);
    return 1.0f;
  }

  static void ahead_of(const Packed&, int64_t) {}
  static Floats finish(const Packed&, int64_t, const Sum* sums, float) { return sums[0]; }
};

struct Int8 {
  using Sum = Ints;
  static constexpr int kLines = 1;
  static constexpr bool kGrouped = false;
  static constexpr int kWidth = 1;
  static constexpr int64_t kTilesFrom = 2;
  static Sum none() { return no_ints(); }
  static void dot(Sum& sum, Vec w, uint32_t x) { dot4(sum, w, x); }
  static Sum load_sum(const uint8_t* at) { return load_ints(reinterpret_cast<const int32_t*>(at)); }
  static void store_sum(uint8_t* at, Sum sum) { store(reinterpret_cast<int32_t*>(at), sum); }

  // One row as code + 128, codes -127..127; behind it 128, which is zero. A row of zeros has scale 0; one
  // that holds inf or NaN has scale NaN, as the product of the exact row would have.
  static float prepare(const void* x, int32_t x_float, int64_t at, int64_t k, uint8_t* into, int64_t bytes) {
    const float most = largest(x, x_float, at, k);
    const bool any = most > kLeast;
    if (any)
      codes(x, x_float, at, k, 127.0f / most, 128, into);
    else
      std::memset(into, 128, k);
    std::memset(into + k, 128, bytes - k);
    return any ? most / 127.0f : most - most;  // 0, or NaN
  }

  // What `finish` will read of a block that comes soon.
  static void ahead_of(const Packed& packed, int64_t block) {
    ahead(packed.at + packed.head.sums_at + 64 * block);
    ahead(packed.at + packed.head.scales_at + 64 * block);
  }

  // x is code + 128: 128 times the sum of the weights' codes is too much.
  static Floats centred(const Packed& packed, int64_t block, Sum sum) {
    const auto* excess = reinterpret_cast<const int32_t*>(packed.at + packed.head.sums_at + 64 * block);
    return to_floats(minus(sum, load_ints(excess)));
  }
  static Floats scaled(const Packed& packed, int64_t block, Floats sum, float scale) {
    const auto* scales = reinterpret_cast<const float*>(packed.at + packed.head.scales_at + 64 * block);
    return times(sum, times(load_floats(scales), all(scale)));
  }
  static Floats finish(const Packed& packed, int64_t block, const Sum* sums, float scale) {
    return scaled(packed, block, centred(packed, block, sums[0]), scale);
  }
};

// Inputs of 16 bits as a line of upper and one of lower bytes, which meet the same vectors of weights.
struct Int8Int16 : Int8 {
  static constexpr int kLines = 2;
  static constexpr float kMostCode = 32639.0f;  // 127 * 256 + 127: either half has a sign

  // Both lines as code + 128, `bytes` each.
  static float prepare(const void* x, int32_t x_float, int64_t at, int64_t k, uint8_t* into, int64_t bytes) {
    const float most = largest(x, x_float, at, k);
    const bool any = most > kLeast;
    std::memset(into, 128, 2 * bytes);
    if (any) halves(x, x_float, at, k, kMostCode / most, into, into + bytes);
    return any ? most / kMostCode : most - most;
  }

  static Floats finish(const Packed& packed, int64_t block, const Sum* sums, float scale) {
    const Floats high = times(centred(packed, block, sums[0]), all(256.0f));
    return scaled(packed, block, plus(high, centred(packed, block, sums[1])), scale);
  }
};

}  // namespace
