// y = x @ w.T + bias for a few rows of x and a weight as torch holds it, read once at the speed of memory.
//
// torch's product for one row reaches less than half of that. Where a weight may be packed, or rounded to
// bfloat16, `dense_linear` reads fewer bytes; here weights stay as they are, and sums are float32 of float32.
#include "scan.h"

struct RowProductCall {
  Rows x;              // [rows, k]
  const void* w;       // [n, k] contiguous, as x
  const float* bias;   // [n] or null
  void* y;             // [rows, n]
  int64_t rows, n, k;
  int32_t is_float, threads;
};

namespace {

constexpr int64_t kOutputs = 64;   // that a thread takes at a time

// One output after the other: the weights come in as one stream, which a processor foresees best.
template <class T>
struct Few {
  const RowProductCall& call;

  template <int M>
  void output(int64_t row, int64_t at) const {
    constexpr int kChains = M == 1 ? 4 : 2;
    const T* w = static_cast<const T*>(call.w) + at * call.k;
    const T* x[M];
    for (int m = 0; m < M; ++m) x[m] = call.x.row<T>(row + m, 0);
    Floats sum[kChains][M];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[c][m] = no_floats();
    int64_t i = 0;
    for (; i + 16 * kChains <= call.k; i += 16 * kChains)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add<M>(sum[c], w, x, i + 16 * c, 16);
    for (; i < call.k; i += 16) add<M>(sum[0], w, x, i, call.k - i);
    for (int m = 0; m < M; ++m) {
      Floats all_sums = sum[0][m];
      for (int c = 1; c < kChains; ++c) all_sums = plus(all_sums, sum[c][m]);
      const float y = total(all_sums) + (call.bias ? call.bias[at] : 0.0f);
      put(static_cast<T*>(call.y) + (row + m) * call.n + at, y);
    }
  }

  template <int M>
  static void add(Floats (&sum)[M], const T* w, const T* const (&x)[M], int64_t at, int64_t count) {
    const Floats weights = take(w + at, count);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[m] = fused(weights, take(x[m] + at, count), sum[m]);
  }

  int32_t operator()(int64_t index) const {
    const int64_t end = std::min(call.n, (index + 1) * kOutputs);
    for (int64_t at = index * kOutputs; at < end; ++at) {
      int64_t row = 0;
      for (; row + 4 <= call.rows; row += 4) output<4>(row, at);
      if (row + 2 <= call.rows) output<2>(row, at), row += 2;
      if (row < call.rows) output<1>(row, at);
    }
    return kOk;
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(row_product)(const RowProductCall& call) {
  const Few<float> wide{call};
  const Few<uint16_t> narrow{call};
  const int64_t count = (call.n + kOutputs - 1) / kOutputs;
  const int32_t threads = call.n * call.k < 100000 ? 1 : call.threads;
  return call.is_float ? share(count, threads, wide) : share(count, threads, narrow);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(row_product, RowProductCall)

EFFC_API int32_t effc_row_product(int32_t level, const void* x, int64_t x_row, const void* w,
                                 const float* bias, void* y, int64_t rows, int64_t n, int64_t k,
                                 int32_t is_float, int32_t threads) {
  const auto body = row_product_at(level);
  if (!body || rows < 0 || n < 1 || k < 1) return kArguments;
  return body(RowProductCall{{x, x_row, 0}, w, bias, y, rows, n, k, is_float, threads});
}
#endif
