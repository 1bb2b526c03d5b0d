// Plain C++: what every processor runs, and what the others are compared with.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Vec { uint8_t v[64]; };
struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };

inline Vec load(const uint8_t* at) {
  Vec w;
  std::memcpy(w.v, at, 64);
  return w;
}
inline void store(uint8_t* at, const Vec& w) { std::memcpy(at, w.v, 64); }

template <int Width>
inline Vec expand(uint64_t mask, const uint8_t* values) {
  Vec w{};
  for (; mask; mask &= mask - 1, values += Width)
    std::memcpy(w.v + Width * __builtin_ctzll(mask), values, Width);
  return w;
}
inline Vec expand2(uint32_t mask, const uint8_t* values) { return expand<2>(mask, values); }
inline Vec expand4(uint64_t mask, const uint8_t* values) { return expand<1>(mask, values); }

inline uint32_t nonzero2(const Vec& w) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i)
    mask |= static_cast<uint32_t>((w.v[2 * i] | (w.v[2 * i + 1] & 0x7f)) != 0) << i;
  return mask;
}
inline uint64_t nonzero4(const Vec& w) {
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<uint64_t>(w.v[i] != 0) << i;
  return mask;
}
template <int Width>
inline void compress(uint8_t* at, uint64_t mask, const Vec& w) {
  for (; mask; mask &= mask - 1, at += Width) std::memcpy(at, w.v + Width * __builtin_ctzll(mask), Width);
}
inline void compress2(uint8_t* at, uint32_t mask, const Vec& w) { compress<2>(at, mask, w); }
inline void compress4(uint8_t* at, uint64_t mask, const Vec& w) { compress<1>(at, mask, w); }

inline Floats no_floats() { return {}; }
inline Ints no_ints() { return {}; }
inline Floats plus(Floats a, const Floats& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints plus(Ints a, const Ints& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline void store(float* at, const Floats& a) { std::memcpy(at, a.v, 64); }
inline void store(int32_t* at, const Ints& a) { std::memcpy(at, a.v, 64); }
inline Floats load_floats(const float* at) {
  Floats a;
  std::memcpy(a.v, at, 64);
  return a;
}
inline Ints load_ints(const int32_t* at) {
  Ints a;
  std::memcpy(a.v, at, 64);
  return a;
}

inline Ints minus(Ints a, const Ints& b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Floats times(Floats a, const Floats& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Floats all(float value) {
  Floats a;
  for (float& v : a.v) v = value;
  return a;
}
inline Floats to_floats(const Ints& a) {
  Floats b;
  for (int i = 0; i < 16; ++i) b.v[i] = static_cast<float>(a.v[i]);
  return b;
}
inline Floats greater(Floats a, const Floats& b) {  // a where it is NaN
  for (int i = 0; i < 16; ++i) a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
  return a;
}
inline bool any_above(const Floats& a, float bound) {
  for (float v : a.v)
    if (v > bound) return true;
  return false;
}
inline float top(const Floats& a) {
  float found = a.v[0];
  for (float v : a.v) found = v > found ? v : found;
  return found;
}
inline float total(const Floats& a) {
  float sum = 0;
  for (float v : a.v) sum += v;
  return sum;
}
// What int32 does not hold becomes its least number, as the instructions of the higher levels have it.
inline int32_t as_int(float x) {
  return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
}
inline Floats power2(const Floats& whole) {
  Floats b;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = (static_cast<uint32_t>(as_int(whole.v[i])) + 127u) << 23;
    std::memcpy(b.v + i, &bits, 4);
  }
  return b;
}
inline Floats load_halves(const uint16_t* at) {
  Floats a;
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    std::memcpy(&half, at + i, 2);
    a.v[i] = from_bf16(half);
  }
  return a;
}
inline void store_halves(uint16_t* at, const Floats& a) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t half = to_bf16(a.v[i]);
    std::memcpy(at + i, &half, 2);
  }
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void dot2(Floats& sum, const Vec& w, uint32_t x) {
  const float even = as_float(x << 16), odd = as_float(x & 0xffff0000u);
  for (int i = 0; i < 16; ++i) {
    uint32_t pair;
    std::memcpy(&pair, w.v + 4 * i, 4);
    sum.v[i] += as_float(pair << 16) * even + as_float(pair & 0xffff0000u) * odd;
  }
}
// Bytes of x have no sign: a code of zero is 128.
constexpr int kZeroByte = 128;
inline void dot4(Ints& sum, const Vec& w, uint32_t x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j)
      sum.v[i] += static_cast<int8_t>(w.v[4 * i + j]) * static_cast<int32_t>(x >> 8 * j & 255);
}

// Signed bytes, four of a lane, meet as many numbers of 16 bits: two words, of the first and third and of the second
// and fourth.
constexpr bool kSplitShorts = false;
constexpr int32_t kBytesGain = 0;
using Bytes = Vec;
inline Bytes load_bytes(const uint8_t* at) { return load(at); }
inline void dot_short(Ints (&sums)[2], const Bytes& w, const uint32_t (&x)[2]) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j)
      sums[j % 2].v[i] += static_cast<int8_t>(w.v[4 * i + j]) * static_cast<int16_t>(x[j % 2] >> 16 * (j / 2));
}
inline Ints joined(const Ints (&sums)[2]) { return plus(sums[0], sums[1]); }

// a * b + sum, rounded once at every level.
inline Floats rounded_once(const Floats& a, const Floats& b, Floats sum) {
  for (int i = 0; i < 16; ++i) sum.v[i] = std::fmaf(a.v[i], b.v[i], sum.v[i]);
  return sum;
}
// a * b + sum, rounded as often as is fastest at this level.
inline Floats multiply_add(const Floats& a, const Floats& b, Floats sum) { return plus(times(a, b), sum); }
inline Vec low_halves(Vec w) {
  for (uint8_t& v : w.v) v &= 15;
  return w;
}
inline Vec high_halves(Vec w) {
  for (uint8_t& v : w.v) v >>= 4;
  return w;
}
inline Ints same(int32_t value) {
  Ints a;
  for (int32_t& v : a.v) v = value;
  return a;
}
inline Ints load_zeros(const uint8_t* at) {
  Ints a;
  for (int i = 0; i < 8; ++i) a.v[i] = at[i] & 15, a.v[i + 8] = at[i] >> 4;
  return a;
}
inline Ints times_short(Ints a, uint32_t x) {
  for (int32_t& v : a.v) v *= static_cast<int16_t>(x);
  return a;
}
inline Vec minus_zeros(Vec codes, const Ints& zeros) {
  for (int i = 0; i < 64; ++i) codes.v[i] = static_cast<uint8_t>(codes.v[i] - zeros.v[i / 4]);
  return codes;
}
inline void dot_codes(Ints& sum, const Vec& codes, uint32_t x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sum.v[i] += codes.v[4 * i + j] * static_cast<int8_t>(x >> 8 * j & 255);
}

constexpr int kGemmRows = 2, kGemmBlocks = 1;
constexpr int kSums = 8;

}  // namespace
