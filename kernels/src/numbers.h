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
// 256 * (high - zero) + low - zero, both differences in -128..127.
inline void halves(const void* x, int32_t x_float, int64_t at, int64_t count, float inverse, int zero,
                   uint8_t* high, uint8_t* low) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = element(x, x_float, at + i) * inverse + 12582912.0f;
    const uint32_t code = word(&shifted) + 0x8080;
    high[i] = static_cast<uint8_t>((code >> 8) + zero - 128);
    low[i] = static_cast<uint8_t>(code + zero - 128);
  }
}

// Where the sums of a block are its outputs as they are.
struct SumsAsOutputs {
  SumsAsOutputs() = default;
  SumsAsOutputs(const Packed&, int64_t) {}
  static Floats of(const Floats* sums, float) { return sums[0]; }
};

struct Bf16 {
  using Sum = Floats;
  using Outputs = SumsAsOutputs;  // what turns the sums of a block, one of each line, into outputs
  static constexpr int kLines = 1;  // rows of bytes that a row of x becomes; each has a sum of its own
  static constexpr bool kGrouped = false;  // whether inputs in groups have scales of their own
  static constexpr bool kRareUpper = false;  // whether the first of two lines is nearly all zeros
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
};

struct Int8 {
  using Sum = Ints;
  static constexpr int kLines = 1;
  static constexpr bool kGrouped = false;
  static constexpr bool kRareUpper = false;
  static constexpr int kWidth = 1;
  static constexpr int64_t kTilesFrom = 2;
  static Sum none() { return no_ints(); }
  static void dot(Sum& sum, Vec w, uint32_t x) { dot4(sum, w, x); }
  static Sum load_sum(const uint8_t* at) { return load_ints(reinterpret_cast<const int32_t*>(at)); }
  static void store_sum(uint8_t* at, Sum sum) { store(reinterpret_cast<int32_t*>(at), sum); }

  // One row as code + kZeroByte, codes -127..127; zeros behind it. A row of zeros has scale 0; one
  // that holds inf or NaN has scale NaN, as the product of the exact row would have.
  static float prepare(const void* x, int32_t x_float, int64_t at, int64_t k, uint8_t* into, int64_t bytes) {
    const float most = largest(x, x_float, at, k);
    const bool any = most > kLeast;
    if (any)
      codes(x, x_float, at, k, 127.0f / most, kZeroByte, into);
    else
      std::memset(into, kZeroByte, k);
    std::memset(into + k, kZeroByte, bytes - k);
    return any ? most / 127.0f : most - most;  // 0, or NaN
  }

  // What `Outputs` will read of a block that comes soon.
  static void ahead_of(const Packed& packed, int64_t block) {
    ahead(packed.at + packed.head.sums_at + 64 * block);
    ahead(packed.at + packed.head.scales_at + 64 * block);
  }

  // Where x is code + 128, 128 times the sum of the weights' codes is too much.
  static Sum excess(const Packed& packed, int64_t block) {
    return kZeroByte ? load_sum(packed.at + packed.head.sums_at + 64 * block) : none();
  }
  struct Outputs {
    Sum excess;
    Floats scales;
    Outputs() = default;
    Outputs(const Packed& packed, int64_t block)
        : excess(Int8::excess(packed, block)),
          scales(load_floats(reinterpret_cast<const float*>(packed.at + packed.head.scales_at + 64 * block))) {}
    Floats centred(Sum sum) const { return to_floats(minus(sum, excess)); }
    Floats scaled(Floats sum, float scale) const { return times(sum, times(scales, all(scale))); }
    Floats of(const Sum* sums, float scale) const { return scaled(centred(sums[0]), scale); }
  };
};

// How many of these exceed `limit`; in runs that fit a sum of 16 bits, so that a compiler counts 32 at once.
inline int64_t count_above(const uint16_t* bits, int64_t count, uint16_t limit) {
  int64_t all = 0;
  for (int64_t from = 0; from < count; from += 4096) {
    uint16_t some = 0;
    for (int64_t i = from; i < std::min(from + 4096, count); ++i) some = static_cast<uint16_t>(some + (bits[i] > limit));
    all += some;
  }
  return all;
}

// A magnitude from `least` to `most` that at most `rare` of the numbers exceed: the smallest such one, or one of them
// within an eighth of an octave of it. `bits`: memory for as many numbers.
inline float clipping_threshold(const void* x, int32_t x_float, int64_t at, int64_t count, int64_t rare, float least,
                                float most, uint16_t* bits) {
  const auto magnitude = [&](int64_t i) {
    const float value = element(x, x_float, at + i);
    return word(&value) & 0x7fffffffu;
  };
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint16_t>(magnitude(i) >> 16);
  uint32_t low = word(&least) >> 16, high = word(&most) >> 16;
  while (high - low > 16) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (count_above(bits, count, middle) <= rare ? high : low) = middle;
  }
  uint32_t common = word(&least);
  const uint32_t above = (high + 1) << 16;
  for (int64_t i = 0; i < count; ++i) {  // a mask, as a branch here keeps GCC from vectors
    const uint32_t own = magnitude(i), below = static_cast<uint32_t>(static_cast<int32_t>(own - above) >> 31);
    common = std::max(common, own & below);
  }
  float value;
  std::memcpy(&value, &common, 4);
  return value;
}

// Inputs of 16 bits as a line of upper and one of lower bytes, which meet the same vectors of weights. The step is that
// of 8 bits for all but the few inputs with the largest magnitudes (the outliers of LLM.int8()): the upper bytes of
// others are zero, and a product of many rows leaves them out.
struct Int8Int16 : Int8 {
  static constexpr int kLines = 2;
  static constexpr bool kRareUpper = true;
  static constexpr int64_t kRare = 96;          // one in so many inputs may have upper bytes
  static constexpr float kMostCode = 32639.0f;  // 127 * 256 + 127: either half has a sign

  // Both lines as code + kZeroByte, `bytes` each.
  static float prepare(const void* x, int32_t x_float, int64_t at, int64_t k, uint8_t* into, int64_t bytes) {
    const float most = largest(x, x_float, at, k);
    if (!(most > kLeast)) {
      std::memset(into, kZeroByte, 2 * bytes);
      return most - most;
    }
    const float common = clipping_threshold(x, x_float, at, k, (k + kRare - 1) / kRare, most * (127.0f / kMostCode),
                                            most, reinterpret_cast<uint16_t*>(into));
    std::memset(into, kZeroByte, 2 * bytes);
    halves(x, x_float, at, k, 127.0f / common, kZeroByte, into, into + bytes);
    return common / 127.0f;
  }

  struct Outputs : Int8::Outputs {
    using Int8::Outputs::Outputs;
    Floats of(const Sum* sums, float scale) const {
      return scaled(plus(times(centred(sums[0]), all(256.0f)), centred(sums[1])), scale);
    }
  };
};

}  // namespace
