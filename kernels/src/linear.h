// y = x @ w.T + bias over a packed weight. A kernel file gives the format of the stream; this one has the
// loops.
//
// Up to 16 rows of x: every vector of weights is made once and meets all rows. More rows: a thread unpacks a
// panel of weights that stays in its L1, and runs a register-blocked product over it (`gemm.h`).
#pragma once
#include <algorithm>

#include "numbers.h"
#include "packed.h"
#include "threads.h"

struct LinearCall {
  const uint8_t* packed;   // checked
  const void* x;           // [rows, k], last dimension contiguous, `stride` elements between rows
  const void* bias;        // [n] or null
  void* y;                 // [rows, n] contiguous, as x
  int64_t rows, stride;
  int32_t x_float, bias_float;  // float32, else bfloat16
  int32_t threads;
};

namespace {

constexpr int kFewRows =
    EFFC_LEVEL == 3 || EFFC_LEVEL == 4 ? 16 : 8;  // the lower levels lack registers for more

// Few rows alone would wait for each sum to be ready again, so they take several chains of sums.
constexpr int chains_for(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows <= 4 ? 2 : 1; }

enum Scratch { kWords, kScales, kRows, kPanels };

// The blocks of one part: equal bytes, not equal counts, since reading the stream is what takes the time.
struct Share {
  int64_t from, to;
  Share(const Packed& packed, int part, int parts) : from(bound(packed, part, parts)),
                                                     to(bound(packed, part + 1, parts)) {}
  static int64_t bound(const Packed& packed, int part, int parts) {
    const int64_t blocks = packed.head.blocks;
    if (part == parts) return blocks;
    const double wanted = double(packed.offset(blocks)) * part / parts;
    int64_t low = 0, high = blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (packed.offset(middle) < wanted) low = middle + 1; else high = middle;
    }
    return low;
  }
};

// A fork and join costs about as much as reading 64 KiB.
inline int parts_for(const Packed& packed, int threads, int64_t rows) {
  const int64_t worth = packed.head.bytes * rows / 65536 + 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, worth, packed.head.blocks})));
}

// 16 finished sums of one row into y. At the end of a row they go through memory of their own.
inline void put(const LinearCall& call, const Packed& packed, int64_t block, int64_t row, Floats sum) {
  const int64_t n = packed.head.n, first = 16 * block, count = std::min<int64_t>(16, n - first);
  const int64_t at = row * n + first;
  if (count == 16) {
    if (call.bias && call.bias_float)
      sum = plus(sum, load_floats(static_cast<const float*>(call.bias) + first));
    if (call.bias && !call.bias_float)
      sum = plus(sum, load_halves(static_cast<const uint16_t*>(call.bias) + first));
    if (call.x_float)
      store(static_cast<float*>(call.y) + at, sum);
    else
      store_halves(static_cast<uint16_t*>(call.y) + at, sum);
    return;
  }
  float values[16];
  store(values, sum);
  for (int64_t i = 0; i < count; ++i) {
    if (call.bias) values[i] += element(call.bias, call.bias_float, first + i);
    if (call.x_float)
      static_cast<float*>(call.y)[at + i] = values[i];
    else
      static_cast<uint16_t*>(call.y)[at + i] = to_bf16(values[i]);
  }
}

template <class Format>
struct FewRows {
  const LinearCall& call;
  const Packed& packed;
  const uint32_t* words;   // [groups][M]
  const float* scales;     // [M]

  template <int M>
  static void part(int part, int parts, void* context) {
    const FewRows& job = *static_cast<const FewRows*>(context);
    const Share share(job.packed, part, parts);
    for (int64_t block = share.from; block < share.to; ++block) {
      typename Format::Sum sums[M];
      for (auto& sum : sums) sum = Format::none();
      Format::template rows<M>(job.packed, block, job.words, sums);
      for (int row = 0; row < M && row < job.call.rows; ++row)
        put(job.call, job.packed, block, row, Format::finish(job.packed, block, sums[row], job.scales[row]));
    }
  }
};

// Rows as words of one group each, [groups][M], so that a vector meets its M words side by side.
template <int M>
void interleave(const uint8_t* rows, int64_t row_bytes, int64_t count, uint32_t* words) {
  for (int64_t group = 0; group < row_bytes / 4; ++group)
#pragma GCC unroll 16
    for (int row = 0; row < M; ++row)
      words[group * M + row] = row < count ? word(rows + row * row_bytes + 4 * group) : 0;
}

template <class Format, int M>
int32_t few_rows(const LinearCall& call, const Packed& packed) {
  const int64_t row_bytes = packed.head.tiles * 64;
  auto* rows = static_cast<uint8_t*>(effc_scratch(kRows, call.rows * row_bytes));
  auto* words = static_cast<uint32_t*>(effc_scratch(kWords, M * row_bytes));
  if (!rows || !words) return kNoMemory;
  float scales[M] = {};
  for (int64_t row = 0; row < call.rows; ++row) {
    uint8_t* into = M == 1 ? reinterpret_cast<uint8_t*>(words) : rows + row * row_bytes;
    scales[row] = Format::prepare(call.x, call.x_float, row * call.stride, packed.head.k, into, row_bytes);
  }
  if (M > 1) interleave<M>(rows, row_bytes, call.rows, words);
  FewRows<Format> job{call, packed, words, scales};
  effc_parallel(parts_for(packed, call.threads, call.rows), FewRows<Format>::template part<M>, &job);
  return kOk;
}

}  // namespace

#include "gemm.h"

namespace {

template <class Format>
int32_t linear(const LinearCall& call) {
  const Packed packed(call.packed);
  if (call.rows == 0) return kOk;
#if EFFC_LEVEL >= 4
  if (call.rows >= kFewRows) return many_rows<Format>(call, packed);
#endif
  if (call.rows == 1) return few_rows<Format, 1>(call, packed);
  if (call.rows == 2) return few_rows<Format, 2>(call, packed);
  if (call.rows <= 4) return few_rows<Format, 4>(call, packed);
#if EFFC_LEVEL == 3 || EFFC_LEVEL == 4
  if (call.rows <= 6) return few_rows<Format, 6>(call, packed);
#endif
  if (call.rows <= 8) return few_rows<Format, 8>(call, packed);
#if EFFC_LEVEL == 3 || EFFC_LEVEL == 4
  if (call.rows <= 12) return few_rows<Format, 12>(call, packed);
  if (call.rows <= kFewRows) return few_rows<Format, kFewRows>(call, packed);
#endif
  return many_rows<Format>(call, packed);
}

}  // namespace

// The exported function of a linear kernel, in the portable compilation only.
#define EFFC_LINEAR(name, kind)                                                                           \
  EFFC_TABLE(name, LinearCall)                                                                            \
  EFFC_API int32_t effc_##name(int32_t level, const uint8_t* packed, int64_t bytes, int64_t n, int64_t k, \
                               const void* x, int64_t rows, int64_t stride, int32_t x_float,              \
                               const void* bias, int32_t bias_float, void* y, int32_t threads) {          \
    if (const int32_t status = effc_check(packed, bytes, kind, n, 0)) return status;                      \
    const auto body = name##_at(level);                                                                   \
    if (!body || rows < 0 || k != Packed(packed).head.k) return kArguments;                               \
    return body(LinearCall{packed, x, bias, y, rows, stride, x_float, bias_float, threads});              \
  }
