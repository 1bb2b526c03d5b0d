// y = x @ w.T + bias over a packed weight. A kernel file gives the format of the stream; this one has the
// loops.
//
// A row of x becomes one line of numbers or, where its numbers take two bytes, two; products see lines alone.
// Up to 16 lines: every vector of weights is made once and meets all. More: a thread unpacks a panel of weights that
// stays in its L1, and runs a register-blocked product over it (`gemm.h`).
#pragma once
#include <algorithm>
#include <type_traits>

#include "linear_call.h"
#include "numbers.h"
#include "packed.h"
#include "share.h"
#include "threads.h"

namespace {

constexpr int kFewRows =
    EFFC_LEVEL == 3 || EFFC_TILES ? 16 : 8;  // the lower levels lack registers for more

// A sum is ready for its next product only after several others, so few rows take several chains of sums.
// AVX-512 has two products a cycle; one of bfloat16 takes six cycles, one of int8 four.
template <class Number>
constexpr int chains_for(int rows) {
  constexpr bool slow = (EFFC_LEVEL == 3 || EFFC_LEVEL == 4) && Number::kWidth == 2;
  if (slow && (rows == 4 || rows == 8)) return 16 / rows;
  return std::max(1, std::min(8, kSums) / rows);
}

template <class Number, int M>
struct Chains {
  static constexpr int kCount = chains_for<Number>(M);
  typename Number::Sum chains[kCount][M];
  Chains() {
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) chains[c][m] = Number::none();
  }
  // A vector of weights meets the words of its group, one of each row.
  void take(int c, Vec w, const uint32_t* words) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) Number::dot(chains[c][m], w, words[m]);
  }
  void add_to(typename Number::Sum (&sums)[M]) const {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) sums[m] = plus(sums[m], chains[c][m]);
  }
};

// A line of a row of x, in bytes.
template <class Format>
int64_t line_bytes(const Header& head) {
  return head.tiles * (x_bytes(head) / Format::kLines);
}

// The lines of one row of x for a weight of this shape, zeros behind each. Returns its scale, 1 where groups have
// theirs.
template <class Format>
float prepare_row(const LinearCall& call, const Header& head, int64_t row, uint8_t* into, int64_t bytes) {
  if constexpr (Format::kGrouped) {
    Format::prepare(call.x, call.x_float, row * call.stride, head, into);
    return 1.0f;
  } else {
    return Format::prepare(call.x, call.x_float, row * call.stride, head.k, into, bytes);
  }
}

enum Scratch { kWords, kScales, kRows, kPanels };

// A fork and join costs about as much as reading 64 KiB.
inline int parts_for(const Packed& packed, int threads, int64_t rows) {
  const int64_t worth = packed.head.bytes * rows / 65536 + 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, worth, packed.head.blocks})));
}

inline Floats combine(const Epilogue& epilogue, int64_t row, int64_t first, Floats sum) {
  if (epilogue.times) sum = times(sum, load_floats(epilogue.times + row * epilogue.times_stride + first));
  if (epilogue.plus) sum = plus(sum, load_floats(epilogue.plus + row * epilogue.plus_stride + first));
  return sum;
}

inline Floats apply(const Epilogue& epilogue, int64_t row, int64_t first, Floats sum) {
  if (epilogue.act) {
    float values[16];
    store(values, sum);
    epilogue.act({epilogue.kind, values, 16});
    sum = load_floats(values);
  }
  return combine(epilogue, row, first, sum);
}

// To the last outputs of a row, fewer than 16.
inline void apply(const Epilogue& epilogue, int64_t row, int64_t first, int64_t count, float* values) {
  if (epilogue.act) epilogue.act({epilogue.kind, values, 16});
  for (int64_t i = 0; epilogue.times && i < count; ++i) values[i] *= epilogue.times[row * epilogue.times_stride + first + i];
  for (int64_t i = 0; epilogue.plus && i < count; ++i) values[i] += epilogue.plus[row * epilogue.plus_stride + first + i];
}

inline int64_t row_stride(const LinearCall& call, int64_t n) { return call.y_stride ? call.y_stride : n; }

// 16 finished sums of one row into y. At the end of a row they go through memory of their own.
inline void put(const LinearCall& call, const Packed& packed, int64_t block, int64_t row, Floats sum) {
  const int64_t n = packed.head.n, first = 16 * block, count = std::min<int64_t>(16, n - first);
  const int64_t at = row * row_stride(call, n) + first;
  if (count == 16) {
    if (call.bias && call.bias_float)
      sum = plus(sum, load_floats(static_cast<const float*>(call.bias) + first));
    if (call.bias && !call.bias_float)
      sum = plus(sum, load_halves(static_cast<const uint16_t*>(call.bias) + first));
    if (call.epilogue) sum = apply(*call.epilogue, row, first, sum);
    if (call.x_float)
      store(static_cast<float*>(call.y) + at, sum);
    else
      store_halves(static_cast<uint16_t*>(call.y) + at, sum);
    return;
  }
  float values[16];
  store(values, sum);
  for (int64_t i = 0; call.bias && i < count; ++i) values[i] += element(call.bias, call.bias_float, first + i);
  if (call.epilogue) apply(*call.epilogue, row, first, count, values);
  for (int64_t i = 0; i < count; ++i)
    if (call.x_float)
      static_cast<float*>(call.y)[at + i] = values[i];
    else
      static_cast<uint16_t*>(call.y)[at + i] = to_bf16(values[i]);
}

// The outputs of a row; `step` bytes from one line's sums to the next's.
template <class Format>
Floats finished(const Packed& packed, int64_t block, const uint8_t* sums, int64_t step, float scale) {
  typename Format::Sum own[Format::kLines];
  for (int line = 0; line < Format::kLines; ++line) own[line] = Format::load_sum(sums + step * line);
  return typename Format::Outputs(packed, block).of(own, scale);
}

template <class Format>
struct FewRows {
  const LinearCall& call;
  const Packed& packed;
  const uint32_t* words;   // [groups][M] of lines
  const float* scales;     // of rows

  template <int M>
  static void part(int part, int parts, void* context) {
    const FewRows& job = *static_cast<const FewRows*>(context);
    const Share share(job.packed, part, parts, job.call.bounds);
    // Where a vector begins is known only after the masks before it: without this the first misses, before
    // the prefetches of the loop reach anything, would come one after the other.
    for (int64_t at = 0; at < Format::kAhead; at += 64) ahead(job.packed.stream(share.from) + at);
    for (int64_t block = share.from; block < share.to; ++block) {
      typename Format::Sum sums[M];
      ahead(job.packed.at + job.packed.head.offsets_at + 8 * (block + 16));
      Format::ahead_of(job.packed, block + 4);
      for (auto& sum : sums) sum = Format::none();
      Format::template rows<M>(job.packed, block, job.words, sums);
      const typename Format::Outputs outputs(job.packed, block);
      for (int row = 0; row < M / Format::kLines && row < job.call.rows; ++row)
        put(job.call, job.packed, block, row, outputs.of(sums + row * Format::kLines, job.scales[row]));
    }
  }
};

// `count` lines of so many bytes, `stride` bytes from one to the next, as words of one group each, [groups][M], so that
// a vector meets its M words side by side.
template <int M>
void interleave(const uint8_t* lines, int64_t bytes, int64_t stride, int64_t count, uint32_t* words) {
  for (int64_t group = 0; group < bytes / 4; ++group)
#pragma GCC unroll 16
    for (int line = 0; line < M; ++line)
      words[group * M + line] = line < count ? word(lines + line * stride + 4 * group) : 0;
}

template <class Format, int M>
int32_t few_rows(const LinearCall& call, const Packed& packed) {
  const int64_t bytes = line_bytes<Format>(packed.head), lines = call.rows * Format::kLines;
  auto* rows = static_cast<uint8_t*>(effc_scratch(kRows, lines * bytes));
  auto* words = static_cast<uint32_t*>(effc_scratch(kWords, M * bytes));
  if (!rows || !words) return kNoMemory;
  float scales[M] = {};
  for (int64_t row = 0; row < call.rows; ++row) {
    uint8_t* into = M == 1 ? reinterpret_cast<uint8_t*>(words) : rows + row * Format::kLines * bytes;
    scales[row] = prepare_row<Format>(call, packed.head, row, into, bytes);
  }
  if (M > 1) interleave<M>(rows, bytes, bytes, lines, words);
  FewRows<Format> job{call, packed, words, scales};
  effc_parallel(parts_for(packed, call.threads, call.rows), FewRows<Format>::template part<M>, &job);
  return kOk;
}

template <int M>
struct Rows {
  static constexpr int kCount = M;
};

}  // namespace

#include "gemm.h"

namespace {

// few(Rows<M>) with the least M that holds the lines of these rows, many() if there is none. Steady: the sums of a row
// run in one chain, few or many, so they do not depend on how many rows there are.
template <class Format, class Few, class Many>
int32_t by_rows(int64_t rows, bool batch_invariant, Few few, Many many) {
  const int64_t lines = rows * Format::kLines;
#if EFFC_TILES
  if constexpr (Format::kTilesFrom <= Format::kLines) return many();
  if (lines >= Format::kTilesFrom || batch_invariant) return many();
#endif
  if constexpr (Format::kLines == 1)
    if (lines == 1 && !batch_invariant) return few(Rows<1>());
  if (lines == 2 && !batch_invariant) return few(Rows<2>());
  if (lines <= 4 && !batch_invariant) return few(Rows<4>());
#if EFFC_LEVEL == 3 || EFFC_TILES
  if (lines <= 6 && batch_invariant) return few(Rows<6>());
#endif
  if (lines <= 8 && (!batch_invariant || chains_for<Format>(8) == 1)) return few(Rows<8>());
#if EFFC_LEVEL == 3 || EFFC_TILES
  if (lines <= 12) return few(Rows<12>());
  if (lines <= kFewRows) return few(Rows<kFewRows>());
#endif
  return many();
}

// Tiles = Format, or what the weight is where tiles multiply it.
template <class Format, class Tiles = Format>
int32_t linear(const LinearCall& call) {
  const Packed packed(call.packed);
  if (call.rows == 0) return kOk;
  return by_rows<Format>(
      call.rows, false, [&](auto rows) { return few_rows<Format, decltype(rows)::kCount>(call, packed); },
      [&] {
        if constexpr (std::is_same_v<Format, Tiles>)
          return many_rows<Format>(call, packed);
        else
          return many_rows<Tiles>(call, Tiles::of(packed));
      });
}

template <class Format, int M>
int32_t few_part(const LinearPart& own, const Packed& packed) {
  const LinearCall& call = own.call;
  auto* words = reinterpret_cast<uint32_t*>(own.words);
  if (own.stage == kMultiply) {
    FewRows<Format> job{call, packed, words, own.scales};
    FewRows<Format>::template part<M>(own.part, own.parts, &job);
    return kOk;
  }
  constexpr int64_t kLines = Format::kLines, kAll = M / kLines;
  const int64_t bytes = line_bytes<Format>(packed.head);
  for (int64_t row = kAll * own.part / own.parts; row < kAll * (own.part + 1) / own.parts; ++row) {
    uint8_t* into = M == 1 ? own.words : own.rows + row * kLines * bytes;
    own.scales[row] = 0;
    if (row < call.rows)
      own.scales[row] = prepare_row<Format>(call, packed.head, row, into, bytes);
    else
      std::memset(into, 0, kLines * bytes);
    for (int64_t group = 0; M > 1 && group < bytes / 4; ++group)
      for (int64_t line = 0; line < kLines; ++line)
        words[group * M + row * kLines + line] = word(into + line * bytes + 4 * group);
  }
  return kOk;
}

template <class Format>
int32_t many_part(const LinearPart& own, const Packed& packed) {
  auto* words = reinterpret_cast<uint32_t*>(own.words);
  ManyRows<Format> job{own.call, packed, 0, own.call.rows, own.rows, words, own.scales, own.panels};
  const auto stage = own.stage == kPrepare ? ManyRows<Format>::prepare : ManyRows<Format>::part;
  stage(own.part, own.parts, &job);
  return kOk;
}

// So many rows as few at a time, for a format whose sums are the same however many rows there are.
template <class Format>
int32_t part_by_part(const LinearPart& own, const Packed& packed) {
  const int64_t bytes = line_bytes<Format>(packed.head), size = own.call.x_float ? 4 : 2, stride = row_stride(own.call, packed.head.n);
  for (int64_t from = 0; from < own.call.rows; from += kFewRows) {
    LinearPart some = own;
    Epilogue epilogue;
    some.call.rows = std::min<int64_t>(kFewRows, own.call.rows - from);
    some.call.x = static_cast<const uint8_t*>(own.call.x) + from * own.call.stride * size;
    some.call.y = static_cast<uint8_t*>(own.call.y) + from * stride * size;
    some.rows += from * bytes;
    some.words += from * bytes;
    some.scales += from;
    if (own.call.epilogue) {
      epilogue = *own.call.epilogue;
      if (epilogue.times) epilogue.times += from * epilogue.times_stride;
      if (epilogue.plus) epilogue.plus += from * epilogue.plus_stride;
      some.call.epilogue = &epilogue;
    }
    if (const int32_t status = few_part<Format, kFewRows>(some, packed)) return status;
  }
  return kOk;
}

// The weights of one output, as an embedding that shares them with the head wants them.
template <class Format>
void read_row(const LinearPart& own, const Packed& packed) {
  constexpr int kPerLane = 4 / Format::kWidth;
  const int64_t block = own.row / 16, lane = own.row % 16;
  const float scale = Format::kWidth == 1 ? reinterpret_cast<const float*>(
                          packed.at + packed.head.scales_at)[own.row] : 1.0f;
  typename Format::Cursor cursor(packed, block);
  alignas(64) uint8_t scratch[1024];
  auto* y = static_cast<float*>(own.call.y);
  for (int64_t at = 0; at < packed.head.k; at += 16 * kPerLane) {
    const uint8_t* vectors = cursor.vectors(1, scratch);
    for (int64_t i = 0; i < std::min<int64_t>(16 * kPerLane, packed.head.k - at); ++i) {
      const uint32_t group = word(vectors + 64 * (i / kPerLane) + 4 * lane);
      if constexpr (Format::kWidth == 1)
        y[at + i] = static_cast<int8_t>(group >> 8 * (i % 4)) * scale;
      else
        y[at + i] = from_bf16(static_cast<uint16_t>(group >> 16 * (i % 2)));
    }
  }
}

template <class Format, class Tiles = Format>
int32_t linear_part(const LinearPart& own) {
  constexpr bool kSame = std::is_same_v<Format, Tiles>;  // else few rows differ from many, and batch-invariant ones must not
  const Packed packed(own.call.packed);
  if (own.stage == kReadRow) {
    if constexpr (Format::kGrouped)
      Format::read_row(packed, own.row, static_cast<float*>(own.call.y));
    else
      read_row<Format>(own, packed);
    return kOk;
  }
  return by_rows<Format>(
      own.call.rows, own.batch_invariant != 0 && kSame,
      [&](auto rows) { return few_part<Format, decltype(rows)::kCount>(own, packed); },
      [&] {
        if constexpr (kSame)
          return many_part<Format>(own, packed);
        else
          return own.batch_invariant ? part_by_part<Format>(own, packed) : many_part<Tiles>(own, Tiles::of(packed));
      });
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
