// What scans and convolutions along a sequence share: vectors of 16 floats beyond `vec.h`, rows of a tensor
// in float or bfloat16, and the range of live positions of a padded sequence.
#pragma once
#include <algorithm>
#include <cmath>

#include "levels.h"
#include "scan_calls.h"
#include "threads.h"
#include "vec.h"

namespace {

#if defined(__AVX512VBMI2__)
inline Floats fused(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats over(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(b.v, a.v)}; }  // a where it is NaN
constexpr int kStates = 4, kLanes = 4;  // 16 vectors of state, 4 of y, 4 of x, 3 that all share: 27 registers
#elif defined(__AVX2__)
inline Floats fused(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats over(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(y.a, x.a), _mm256_min_ps(y.b, x.b)}; }
constexpr int kStates = 4, kLanes = 1;  // 8 registers of state, 2 of y, 2 of x, 3 that all share
#elif defined(__ARM_FEATURE_DOTPROD)
inline Floats fused(const Floats& x, const Floats& y, const Floats& z) { return rounded_once(x, y, z); }
inline Floats over(const Floats& x, const Floats& y) {
  return by_register<Floats>([](float32x4_t p, float32x4_t q) { return vdivq_f32(p, q); }, x, y);
}
inline Floats smaller(const Floats& x, const Floats& y) {  // x where it is NaN
  return by_register<Floats>([](float32x4_t p, float32x4_t q) { return vbslq_f32(vcltq_f32(q, p), q, p); }, x, y);
}
constexpr int kStates = 4, kLanes = 1;  // 16 registers of state, 4 of y, 4 of x, 4 that all share
#else
inline Floats fused(const Floats& a, const Floats& b, const Floats& c) { return plus(times(a, b), c); }
inline Floats over(Floats a, const Floats& b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
inline Floats smaller(Floats a, const Floats& b) {  // a where it is NaN
  for (int i = 0; i < 16; ++i) a.v[i] = b.v[i] < a.v[i] ? b.v[i] : a.v[i];
  return a;
}
constexpr int kStates = 2, kLanes = 1;
#endif

// exp, to 2e-7 of the result; what lies outside -87 .. 88 counts as that bound.
inline Floats exponential(Floats x) {
  const Floats clipped = smaller(greater(x, all(-87.0f)), all(88.0f));
  const Floats whole = plus(fused(clipped, all(1.44269504f), all(12582912.0f)), all(-12582912.0f));
  const Floats near = fused(whole, all(-0.693359375f), clipped);
  const Floats rest = fused(whole, all(2.12194440e-4f), near);
  Floats sum = fused(all(1.9875691500e-4f), rest, all(1.3981999507e-3f));
  for (float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = fused(sum, rest, all(next));
  return times(plus(fused(sum, times(rest, rest), rest), all(1.0f)), power2(whole));
}

inline Floats sigmoid(Floats x) {
  return over(all(1.0f), plus(all(1.0f), exponential(times(x, all(-1.0f)))));
}
inline Floats silu(Floats x) { return times(x, sigmoid(x)); }

// log(1 + exp(x)) as max(x, 0) + log1p(u), u = exp(-|x|) <= 1; log1p(u) = 2 artanh(s), s = u / (2 + u).
inline Floats softplus(Floats x) {
  const Floats u = exponential(times(greater(x, times(x, all(-1.0f))), all(-1.0f)));
  const Floats s = over(u, plus(all(2.0f), u)), square = times(s, s);
  Floats sum = all(1.0f / 15);
  for (float next : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f})
    sum = fused(sum, square, all(next));
  return fused(times(s, all(2.0f)), sum, greater(x, no_floats()));
}

inline float number(float x) { return x; }
inline float number(uint16_t x) { return from_bf16(x); }
inline void put(float* at, float x) { *at = x; }
inline void put(uint16_t* at, float x) { *at = to_bf16(x); }

// Up to 16 numbers, zeros behind them.
inline Floats take(const float* at, int64_t count) {
  if (count >= 16) return load_floats(at);
  alignas(64) float part[16] = {};
  std::memcpy(part, at, 4 * std::max<int64_t>(count, 0));
  return load_floats(part);
}
inline Floats take(const uint16_t* at, int64_t count) {
  if (count >= 16) return load_halves(at);
  alignas(64) uint16_t part[16] = {};
  std::memcpy(part, at, 2 * std::max<int64_t>(count, 0));
  return load_halves(part);
}
inline void give(float* at, Floats x, int64_t count) {
  if (count >= 16) return store(at, x);
  alignas(64) float part[16];
  store(part, x);
  std::memcpy(at, part, 4 * std::max<int64_t>(count, 0));
}
inline void give(uint16_t* at, Floats x, int64_t count) {
  if (count >= 16) return store_halves(at, x);
  alignas(64) uint16_t part[16];
  store_halves(part, x);
  std::memcpy(at, part, 2 * std::max<int64_t>(count, 0));
}

// Runs body(i) for those of i in 0 .. count - 1 that are one part's; each part gets neighbours.
template <class Body>
int32_t share_of(int32_t part, int32_t parts, int64_t count, Body& body) {
  int32_t status = kOk;
  const int64_t to = count * (part + 1) / parts;
  for (int64_t i = count * part / parts; i < to && status == kOk; ++i) status = body(i);
  return status;
}

// Runs body(i) for i in 0 .. count - 1, in up to `threads` threads; each gets neighbours.
template <class Body>
int32_t share(int64_t count, int32_t threads, Body& body) {
  struct Job {
    Body& body;
    int64_t count;
    int32_t status[64];
  } job{body, count, {}};
  const int parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, 64, count})));
  effc_parallel(
      parts,
      [](int part, int parts, void* context) {
        auto& own = *static_cast<Job*>(context);
        own.status[part] = share_of(part, parts, own.count, own.body);
      },
      &job);
  for (int32_t s : job.status)
    if (s != kOk) return s;
  return kOk;
}

}  // namespace
