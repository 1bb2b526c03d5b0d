// More than 16 rows. A thread takes its blocks of outputs a few at a time, unpacks up to kDepth tiles of them
// into its panel and multiplies all rows of the chunk with it; sums wait in memory between two depths.
#pragma once

#if EFFC_LEVEL >= 4
#include "tile_stream.h"
#endif

namespace {

#if EFFC_LEVEL >= 4
constexpr int kAtOnce = 2;        // blocks: two columns of tiles
constexpr int kPanelBlocks = 8;   // that meet a slice of x while it is in the second cache
#else
constexpr int kAtOnce = kGemmBlocks, kPanelBlocks = kGemmBlocks;
#endif

constexpr int64_t kChunk = kLinearRows;  // rows that share one unpacking
constexpr int64_t kDepth = 8;    // tiles of 1 KiB: with 4 blocks a panel of 32 KiB, which stays in L1

// Where a part keeps its things.
struct Panel {
  // Not powers of two: the blocks of a panel would all fall into the same few sets of a cache.
  static constexpr int64_t kGroups = EFFC_LEVEL >= 4 ? 0 : 16 * 128;  // what groups of inputs have beside weights
  static constexpr int64_t kBlock = kDepth * 1024 + kGroups + 192, kBetween = kChunk * 64 + 320;
  static constexpr int64_t kWeights = kAtOnce * kBlock, kBytes = kWeights + kPanelBlocks * kBetween;
  static_assert(kBytes <= kPanelBytes, "callers make room for every level");
  uint8_t *weights, *sums;  // sums [block][row] of 64 bytes
  Panel(uint8_t* all, int part) : weights(all + part * kBytes), sums(weights + kWeights) {}
};

constexpr int kFewest = kGemmRows > 2 ? kGemmRows - 2 : 1;  // rows of a block, see below

// Rows of a chunk in blocks of nearly kGemmRows, so that none is left with one or two.
struct RowBlocks {
  int64_t rows, count;
  explicit RowBlocks(int64_t rows) : rows(rows), count((rows + kGemmRows - 1) / kGemmRows) {}
  int64_t start(int64_t i) const { return rows * i / count; }
};

template <class Format>
struct ManyRows {
  const LinearCall& call;
  const Packed& packed;
  int64_t first, rows;   // of this chunk
  uint8_t* prepared;     // [rows] of row_bytes
  uint32_t* words;       // by block of rows [groups][its rows]
  float* scales;
  uint8_t* panels;
  int64_t row_bytes() const { return packed.head.tiles * x_bytes(packed.head); }
  int64_t depth() const { return Format::kGrouped ? 64 * kDepth / group_of(packed.head) : kDepth; }

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

  // One block of rows by N blocks of outputs, whichever form the sums have.
  template <int M, int N>
  void meet(const uint8_t* const* blocks, int64_t from, int64_t tiles, const uint32_t* words,
            uint8_t* sums) const {
    if constexpr (Format::kGrouped)
      Format::template product<M, N>(packed, blocks, from, tiles, words, sums, Panel::kBetween);
    else
      product<M, N>(blocks, tiles * 16, words, sums, Panel::kBetween, from > 0);
  }

  template <int N>
  void all_rows([[maybe_unused]] int64_t block, const uint8_t* const* blocks, [[maybe_unused]] const typename Format::Cursor* next,
                int64_t from, int64_t tiles, uint8_t* sums) const {
    const int64_t before = from * x_bytes(packed.head);  // of each row of x
#if EFFC_LEVEL >= 4
    if constexpr (Format::kGrouped) {
      const TileRows x{prepared + before, row_bytes(), rows};
      Format::template tile_groups<N>(packed, block, blocks, from, tiles, x, sums, Panel::kBetween);
    } else {
      const int64_t steps = tiles * ((rows + 31) / 32);
      Soon<N> soon;
      soon.lines = (16 * tiles + steps - 1) / steps;
      for (int b = 0; b < N; ++b) soon.at[b] = next[b].at;
      tile_rows<Format, N>(blocks, from, tiles, {prepared, row_bytes(), rows}, sums, Panel::kBetween, soon);
    }
#else
    const RowBlocks blocked(rows);
    for (int64_t i = 0; i < blocked.count; ++i) {
      const int64_t start = blocked.start(i), m = blocked.start(i + 1) - start;
      const uint32_t* block_words = words + start * (row_bytes() / 4) + before / 4 * m;
      uint8_t* own = sums + 64 * start;
      if (m == kGemmRows)
        meet<kGemmRows, N>(blocks, from, tiles, block_words, own);
      else if (m == kGemmRows - 1)
        meet<kGemmRows - 1, N>(blocks, from, tiles, block_words, own);
      else
        meet<kFewest, N>(blocks, from, tiles, block_words, own);
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
    for (int64_t row = 0; row < rows; ++row)
      for (int b = 0; b < count; ++b) {
        const auto sum = Format::load_sum(panel.sums + b * Panel::kBetween + row * 64);
        put(call, packed, block + b, first + row, Format::finish(packed, block + b, sum, scales[row]));
      }
  }

#if EFFC_LEVEL >= 4
  static void prepare(int part, int parts, void* context) {
    const ManyRows& job = *static_cast<const ManyRows*>(context);
    const int64_t bytes = job.row_bytes(), count = (job.rows + kTileRows - 1) / kTileRows;
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
      const int64_t start = kTileRows * i, rows = std::min(kTileRows, job.rows - start);
      uint8_t* const own = job.prepared + start * bytes;
      uint8_t* const plain = reinterpret_cast<uint8_t*>(job.words) + start * bytes;  // not needed for words here
      for (int64_t row = 0; row < rows; ++row) {
        uint8_t* const into = Format::kGrouped ? own + row * bytes : plain;
        job.scales[start + row] = prepare_row<Format>(job.call, job.packed.head, job.first + start + row, into, bytes);
        if (!Format::kGrouped) lay_in_tiles(plain, job.packed.head.tiles, rows, own + 64 * row);
      }
    }
  }
#else
  static void prepare(int part, int parts, void* context) {
    const ManyRows& job = *static_cast<const ManyRows*>(context);
    const RowBlocks blocked(job.rows);
    const int64_t bytes = job.row_bytes();
    for (int64_t i = blocked.count * part / parts; i < blocked.count * (part + 1) / parts; ++i) {
      const int64_t start = blocked.start(i), m = blocked.start(i + 1) - start;
      for (int64_t row = start; row < start + m; ++row) {
        uint8_t* const into = job.prepared + row * bytes;
        job.scales[row] = prepare_row<Format>(job.call, job.packed.head, job.first + row, into, bytes);
        if constexpr (Format::kGrouped) Format::meet_panels(job.packed.head, into);
      }
      const uint8_t* from = job.prepared + start * bytes;
      uint32_t* into = job.words + start * (bytes / 4);
      if (m == kGemmRows)
        interleave<kGemmRows>(from, bytes, m, into);
      else if (m == kGemmRows - 1)
        interleave<kGemmRows - 1>(from, bytes, m, into);
      else
        interleave<kFewest>(from, bytes, m, into);
    }
  }
#endif

  static void part(int part, int parts, void* context) {
    const ManyRows& job = *static_cast<const ManyRows*>(context);
    const Panel panel(job.panels, part);
    const Share share(job.packed, part, parts, job.call.bounds);
#if EFFC_LEVEL >= 4
    const TileUse tiles;
    if constexpr (!Format::kGrouped)
      if (job.rows <= kStreamRows) {
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
  auto* panels = static_cast<uint8_t*>(effc_scratch(kPanels, parts * Panel::kBytes));
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
