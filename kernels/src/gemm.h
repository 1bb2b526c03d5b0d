// More than 16 lines. A thread takes its blocks of outputs a few at a time, unpacks up to kDepth tiles of them
// into its panel and multiplies all rows of the chunk with it; sums wait in memory between two depths.
#pragma once

#if EFFC_TILES
#include "tile_stream.h"
#else
#include "rare_upper.h"
#endif

namespace {

#if EFFC_TILES
constexpr int kAtOnce = 2;           // blocks: two columns of tiles
constexpr int kMostPanelBlocks = 8;  // that meet a slice of x while it is in the second cache
constexpr int64_t kDepth = 12;       // tiles of 1 KiB: two blocks of them stay in L1 while x passes
#else
constexpr int kAtOnce = kGemmBlocks, kMostPanelBlocks = kGemmBlocks;
constexpr int64_t kDepth = 8;  // tiles of 1 KiB: with 4 blocks a panel of 32 KiB, which stays in L1
#endif
constexpr int64_t kGroupedDepth = 8;

constexpr int64_t kChunk = kLinearRows;  // rows that share one unpacking

// Where a part keeps its things.
template <class Format>
struct Panel {
  static constexpr int kPanelBlocks = std::max(kAtOnce, kMostPanelBlocks / Format::kLines);
  // Not powers of two: the blocks of a panel would all fall into the same few sets of a cache.
  static constexpr int64_t kGroups = EFFC_TILES ? 0 : 16 * 128;  // what groups of inputs have beside weights
  static constexpr int64_t kBlock = kDepth * 1024 + kGroups + 192, kBetween = kChunk * Format::kLines * 64 + 320;
  static constexpr int64_t kWeights = kAtOnce * kBlock, kBytes = kWeights + kPanelBlocks * kBetween;
  static_assert(kBytes <= kPanelBytes, "callers make room for every level");
  uint8_t *weights, *sums;  // sums [block][line] of 64 bytes
  // As far apart for every format: one thread may multiply by int8 while another still does by bfloat16.
  Panel(uint8_t* all, int part) : weights(all + part * kPanelBytes), sums(weights + kWeights) {}
};

// Rows of a chunk in blocks of nearly kMost, so that none is left with one or two. A row's lines are in one block;
// upper lines that are nearly all zeros are apart from it.
template <class Format>
struct RowBlocks {
  static constexpr int kLines = Format::kRareUpper ? 1 : Format::kLines;
  static constexpr int kMost = (kGemmRows + kLines - 1) / kLines;
  static constexpr int kLess = std::max(kMost - 1, 1), kFewer = std::max(kMost - 2, 1), kFewest = std::max(kMost - 3, 1);
  int64_t rows, count;
  explicit RowBlocks(int64_t rows) : rows(rows), count((rows + kMost - 1) / kMost) {}
  int64_t start(int64_t i) const { return rows * i / count; }

  // act(Rows<M>) for a block of so many rows.
  template <class Act>
  static void by_count(int64_t m, Act act) {
    if (m == kMost)
      act(Rows<kMost>());
    else if (m == kLess)
      act(Rows<kLess>());
    else if (m == kFewer)
      act(Rows<kFewer>());
    else  // 7 rows where at most 6 make a block, or one or two rows behind whole chunks: zeros stand beside them
      act(Rows<kFewest>());
  }
};

template <class Format>
struct ManyRows {
  using Panel = ::Panel<Format>;
  using Lots = RowBlocks<Format>;
  static constexpr int64_t kLines = Format::kLines;
  static constexpr int kPanelBlocks = Panel::kPanelBlocks;
  const LinearCall& call;
  const Packed& packed;
  int64_t first, rows;   // of this chunk
  uint8_t* prepared;     // [rows] of row_bytes
  uint32_t* words;       // by block of rows [groups][its lines]
  float* scales;
  uint8_t* panels;
  int64_t row_bytes() const { return packed.head.tiles * x_bytes(packed.head); }
  int64_t lines() const { return rows * kLines; }
  int64_t depth() const {
    if (Format::kGrouped) return 64 * kGroupedDepth / group_of(packed.head);
    if (!EFFC_TILES) return kDepth;
    const int64_t depths = (packed.head.tiles + kDepth - 1) / kDepth;
    return (packed.head.tiles + depths - 1) / depths;
  }

  // `blocks[b]`: vectors of `groups` groups. words: of these groups.
  template <int M, int N>
  static void product(const uint8_t* const* blocks, int64_t groups, const uint32_t* words, uint8_t* sums,
                      int64_t between, bool again) {
    typename Format::Sum sum[N][M];  // in registers only if every loop over it is unrolled
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[b][m] = Format::none();
    if (again)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[b][m] = Format::load_sum(sums + b * between + 64 * m);
    const uint8_t* at[N];
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) at[b] = blocks[b];
    for (int64_t group = 0; group < groups; ++group, words += M) {
      Vec w[N];
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) w[b] = load(at[b] + 64 * group);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int b = 0; b < N; ++b) Format::dot(sum[b][m], w[b], words[m]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) Format::store_sum(sums + b * between + 64 * m, sum[b][m]);
  }

  // Where the sums of a row and of its lines lie in a panel. Those of rare upper lines lie before all others.
  static constexpr bool kApart = Format::kRareUpper && !EFFC_TILES;
  static constexpr int64_t kRowStep = kApart ? 64 : 64 * kLines, kLineStep = kApart ? 64 * kChunk : 64;

  // M lines by N blocks of outputs, whichever form the sums have.
  template <int M, int N>
  void meet(const uint8_t* const* blocks, int64_t from, int64_t tiles, const uint32_t* words,
            uint8_t* sums) const {
    if constexpr (Format::kGrouped)
      Format::template product<M, N>(packed, blocks, from, tiles, words, sums, Panel::kBetween);
    else
      product<M, N>(blocks, tiles * 16, words, sums, Panel::kBetween, from > 0);
  }

#if !EFFC_TILES
  // The upper lines of a block of rows that begins at `start`: what is multiplied lies where its first lower line was,
  // its words behind those of the lower lines.
  UpperFours upper_fours(int64_t start, int64_t count) const {
    const int64_t line = line_bytes<Format>(packed.head), tiles = packed.head.tiles;
    return {prepared + start * row_bytes() + line, words + (start * row_bytes() + count * line) / 4,
            (tiles + kDepth - 1) / kDepth};
  }

  template <int M, int N>
  void meet_upper(int64_t block, const uint8_t* const* blocks, int64_t from, int64_t start, uint8_t* sums) const {
    for (int b = 0; from == 0 && b < N; ++b)
      for (int m = 0; m < M; ++m)
        Format::store_sum(sums + b * Panel::kBetween + 64 * m, Format::excess(packed, block + b));
    upper_fours(start, M).template multiply<Format, M, N>(from / kDepth, blocks, sums, Panel::kBetween);
  }
#endif

  template <int N>
  void all_rows([[maybe_unused]] int64_t block, const uint8_t* const* blocks, [[maybe_unused]] const typename Format::Cursor* next,
                int64_t from, int64_t tiles, uint8_t* sums) const {
#if EFFC_TILES
    const int64_t steps = tiles * ((lines() + 31) / 32);
    Soon<N> soon;
    soon.lines = (16 * tiles + steps - 1) / steps;
    for (int b = 0; b < N; ++b) soon.at[b] = next[b].at;
    const bool last = from + tiles == packed.head.tiles, whole = from == 0 && last;
    const int64_t between = whole ? 2 * 2048 : Panel::kBetween;
    const auto done = [&](int64_t line, int64_t count, const uint8_t* own) {  // sums are in the nearest cache
      if (last) finish(block, N, own, between, line / kLines, count / kLines);
    };
    tile_rows<Format, N>(blocks, from, tiles, {prepared, line_bytes<Format>(packed.head), lines()}, sums,
                         whole ? 2 : kChunk * kLines / 32, between, soon, done);
#else
    const int64_t before = from * x_bytes(packed.head) / (Format::kLines / Lots::kLines);  // of each row's lines
    const Lots blocked(rows);
    for (int64_t i = 0; i < blocked.count; ++i) {
      const int64_t start = blocked.start(i), m = blocked.start(i + 1) - start;
      uint8_t* own = sums + start * kRowStep;
      Lots::by_count(m, [&](auto count) {
        constexpr int M = decltype(count)::kCount;
        const uint32_t* block_words = words + start * (row_bytes() / 4) + before / 4 * M;
        if constexpr (Format::kRareUpper) {
          meet_upper<M, N>(block, blocks, from, start, own);
          meet<M, N>(blocks, from, tiles, block_words, own + kLineStep);
        } else {
          meet<M * Format::kLines, N>(blocks, from, tiles, block_words, own);
        }
      });
    }
#endif
  }

  // N blocks over one depth; `cursors` [N] go on behind it. `next`: those that the following call will read.
  template <int N>
  void meet_rows(int64_t block, typename Format::Cursor* cursors, const typename Format::Cursor* next, int64_t from,
                 const Panel& panel, uint8_t* sums) const {
    const int64_t tiles = std::min(depth(), packed.head.tiles - from);
    const uint8_t* vectors[N];
    for (int b = 0; b < N; ++b) vectors[b] = cursors[b].vectors(tiles, panel.weights + b * Panel::kBlock);
    all_rows<N>(block, vectors, next, from, tiles, sums);
  }

  // Up to kPanelBlocks blocks, kAtOnce at a time if as many are left.
  void blocks(int64_t block, int count, const Panel& panel) const {
    typename Format::Cursor cursors[kPanelBlocks];
    for (int b = 0; b < count; ++b) cursors[b] = typename Format::Cursor(packed, block + b);
    for (int64_t from = 0; from < packed.head.tiles; from += depth())
      for (int b = 0; b < count;) {
        uint8_t* sums = panel.sums + b * Panel::kBetween;
        const int step = count - b >= kAtOnce ? kAtOnce : 1;
        const auto* next = cursors + (b + 2 * step <= count ? b + step : 0);
        if (step == kAtOnce)
          meet_rows<kAtOnce>(block + b, cursors + b, next, from, panel, sums);
        else
          meet_rows<1>(block + b, cursors + b, next, from, panel, sums);
        b += step;
      }
    if (!EFFC_TILES) finish(block, count, panel.sums, Panel::kBetween, 0, rows);
  }

  // Outputs of `count` blocks and some rows of the chunk. Works on copies of what is read: whatever y might overlap
  // would be read again for each block of each row.
  void finish(int64_t block, int count, const uint8_t* sums, int64_t between, int64_t from, int64_t number) const {
    const LinearCall to = call;
    const Packed weight = packed;
    const bool whole = 16 * (block + count) <= weight.head.n, of_floats = to.x_float && (!to.bias || to.bias_float);
    if (whole && of_floats && to.epilogue)
      return finish_with_epilogue(*to.epilogue, block, count, sums, between, from, number);
    if (whole && of_floats) {
      const int64_t stride = row_stride(to, weight.head.n);
      float* const y = static_cast<float*>(to.y) + (first + from) * stride + 16 * block;
      return finish_blocks(block, count, sums, between, from, number, y, stride);
    }
    for (int64_t row = 0; row < number; ++row)
      for (int b = 0; b < count; ++b) {
        const uint8_t* own = sums + b * between + row * kRowStep;
        put(to, weight, block + b, first + from + row, output(Outputs(weight, block + b), own, scales[from + row]));
      }
  }

  using Outputs = typename Format::Outputs;
  static Floats output(const Outputs& outputs, const uint8_t* sums, float scale) {
    typename Format::Sum own[kLines];
    for (int line = 0; line < kLines; ++line) own[line] = Format::load_sum(sums + kLineStep * line);
    return outputs.of(own, scale);
  }

  // Outputs of whole blocks as float32, with their bias, from `y` on.
  void finish_blocks(int64_t block, int count, const uint8_t* sums, int64_t between, int64_t from, int64_t number, float* y,
                     int64_t stride) const {
    for (int b = 0; b < count;) {
      const int step = count - b >= kAtOnce ? kAtOnce : 1;
      if (step == kAtOnce)
        finish_at_once<kAtOnce>(block + b, sums + b * between, between, from, number, y + 16 * b, stride);
      else
        finish_at_once<1>(block + b, sums + b * between, between, from, number, y + 16 * b, stride);
      b += step;
    }
  }

  template <int N>
  void finish_at_once(int64_t block, const uint8_t* sums, int64_t between, int64_t from, int64_t number, float* y,
                      int64_t stride) const {
    const float *const own_scales = scales + from, *const bias = static_cast<const float*>(call.bias);
    Outputs outputs[N];
    Floats biases[N];
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) {
      outputs[b] = Outputs(packed, block + b);
      biases[b] = bias ? load_floats(bias + 16 * (block + b)) : no_floats();
    }
    for (int64_t row = 0; row < number; ++row, sums += kRowStep, y += stride)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) {
        const Floats sum = output(outputs[b], sums + b * between, own_scales[row]);
        store(y + 16 * b, bias ? plus(sum, biases[b]) : sum);
      }
  }

  // An activation takes the outputs of some rows at once, and by then the numbers that they meet are near.
  void finish_with_epilogue(const Epilogue epilogue, int64_t block, int count, const uint8_t* sums, int64_t between,
                            int64_t from, int64_t number) const {
    constexpr int64_t kRows = 32;
    alignas(64) float values[kRows * 16 * kPanelBlocks];
    const int64_t stride = row_stride(call, packed.head.n), width = 16 * count;
    for (int64_t begin = 0; begin < number; begin += kRows) {
      const int64_t rows = std::min(kRows, number - begin), row = first + from + begin;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t column = 16 * block; column < 16 * block + width; column += 16) {
          if (epilogue.times) ahead(epilogue.times + (row + i) * epilogue.times_stride + column);
          if (epilogue.plus) ahead(epilogue.plus + (row + i) * epilogue.plus_stride + column);
        }
      finish_blocks(block, count, sums + begin * kRowStep, between, from + begin, rows, values, width);
      if (epilogue.act) epilogue.act({epilogue.kind, values, width * rows});
      float* y = static_cast<float*>(call.y) + row * stride + 16 * block;
      for (int64_t i = 0; i < rows; ++i, y += stride)
        for (int64_t column = 0; column < width; column += 16)
          store(y + column, combine(epilogue, row + i, 16 * block + column, load_floats(values + i * width + column)));
    }
  }

#if EFFC_TILES
  static void prepare(int part, int parts, void* context) {
    const ManyRows& job = *static_cast<const ManyRows*>(context);
    const int64_t bytes = line_bytes<Format>(job.packed.head), count = (job.lines() + kTileRows - 1) / kTileRows;
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
      const int64_t start = kTileRows * i, lines = std::min(kTileRows, job.lines() - start);
      uint8_t* const own = job.prepared + start * bytes;
      uint8_t* const plain = reinterpret_cast<uint8_t*>(job.words) + start * bytes;  // not needed for words here
      for (int64_t line = 0; line < lines; line += kLines) {
        const int64_t row = (start + line) / kLines;
        job.scales[row] = prepare_row<Format>(job.call, job.packed.head, job.first + row, plain, bytes);
        for (int64_t n = 0; n < kLines; ++n)
          lay_in_tiles(plain + n * bytes, job.packed.head.tiles, lines, own + 64 * (line + n));
      }
    }
  }
#else
  static void prepare(int part, int parts, void* context) {
    const ManyRows& job = *static_cast<const ManyRows*>(context);
    const Lots blocked(job.rows);
    const int64_t bytes = job.row_bytes(), line = line_bytes<Format>(job.packed.head);
    for (int64_t i = blocked.count * part / parts; i < blocked.count * (part + 1) / parts; ++i) {
      const int64_t start = blocked.start(i), m = blocked.start(i + 1) - start;
      for (int64_t row = start; row < start + m; ++row) {
        uint8_t* const into = job.prepared + row * bytes;
        job.scales[row] = prepare_row<Format>(job.call, job.packed.head, job.first + row, into, line);
        if constexpr (Format::kGrouped) Format::meet_panels(job.packed.head, into);
      }
      const uint8_t* from = job.prepared + start * bytes;
      uint32_t* into = job.words + start * (bytes / 4);
      Lots::by_count(m, [&](auto count) {
        constexpr int M = decltype(count)::kCount;
        if constexpr (Format::kRareUpper) {
          interleave<M>(from + line, line, bytes, m, into);
          job.upper_fours(start, M).template list<M>(from, line, bytes, m, 16 * kDepth);
        } else {
          interleave<M * Format::kLines>(from, line, line, m * Format::kLines, into);
        }
      });
    }
  }
#endif

  static void part(int part, int parts, void* context) {
    const ManyRows& job = *static_cast<const ManyRows*>(context);
    const Panel panel(job.panels, part);
    const Share share(job.packed, part, parts, job.call.bounds);
#if EFFC_TILES
    const TileUse tiles;
    if (job.lines() <= kStreamRows) {
      const TileStream<Format> stream{job.call,     job.packed, job.first,     job.rows,
                                      job.prepared, job.scales, panel.weights, panel.sums};
      return stream.blocks(share.from, share.to);
    }
#endif
    for (int64_t block = share.from; block < share.to; block += kPanelBlocks)
      job.blocks(block, static_cast<int>(std::min<int64_t>(kPanelBlocks, share.to - block)), panel);
  }
};

template <class Format>
int32_t many_rows(const LinearCall& call, const Packed& packed) {
  const int parts = parts_for(packed, call.threads, call.rows);
  const int64_t bytes = packed.head.tiles * x_bytes(packed.head), most = std::min(call.rows, kChunk);
  auto* prepared = static_cast<uint8_t*>(effc_scratch(kRows, most * bytes));
  auto* words = static_cast<uint32_t*>(effc_scratch(kWords, most * bytes));
  auto* scales = static_cast<float*>(effc_scratch(kScales, kChunk * sizeof(float)));
  auto* panels = static_cast<uint8_t*>(effc_scratch(kPanels, parts * kPanelBytes));
  if (!prepared || !words || !scales || !panels) return kNoMemory;
  for (int64_t first = 0; first < call.rows; first += kChunk) {
    const int64_t rows = std::min(kChunk, call.rows - first);
    ManyRows<Format> job{call, packed, first, rows, prepared, words, scales, panels};
    if (rows <= kFewRows)  // sooner done than handed out
      ManyRows<Format>::prepare(0, 1, &job);
    else
      effc_parallel(parts, ManyRows<Format>::prepare, &job);
    effc_parallel(parts, ManyRows<Format>::part, &job);
  }
  return kOk;
}

}  // namespace
