// Up to 32 lines on AMX, from one on: every block is a stream of tiles that is read once from end to end and meets
// all lines. Two streams run side by side, one from each half of a part's blocks: a product waits for the one
// before it into the same sums, which the other's fills, and each half stays one run of memory.
//
// A row's sums take the tiles in their order, as in `gemm.h`: they do not depend on how many rows there are.
#pragma once
#include "amx.h"

namespace {

constexpr int64_t kStreamRows = 2 * kTileRows;

template <class Format>
struct TileStream {
  const LinearCall& call;
  const Packed& packed;
  int64_t first, rows;       // of the call
  const uint8_t* prepared;   // the lines as tiles
  const float* scales;
  uint8_t *ring, *sums;      // 4 KiB each

  // What was stored a moment ago is not handed on to a tile, so a tile is unpacked while the one before is multiplied.
  static constexpr int64_t kRing = 2, kLag = Format::kUnpacked ? 1 : 0;

  int64_t lines() const { return rows * Format::kLines; }

  void blocks(int64_t from, int64_t to) const {
    const int upper = static_cast<int>(std::min(lines(), kTileRows));
    shape_tiles(upper, static_cast<int>(lines()) - upper);
    const int64_t half = (to - from) / 2;
    for (int64_t block = from; block < from + half; ++block) take<2>({block, block + half});
    if ((to - from) % 2) take<1>({to - 1});
  }

  template <int N>
  void take(const int64_t (&blocks)[N]) const {
    typename Format::Cursor cursors[N];
    for (int b = 0; b < N; ++b) {
      cursors[b] = typename Format::Cursor(packed, blocks[b]);
      ahead(packed.at + packed.head.offsets_at + 8 * (blocks[b] + 16));
      Format::ahead_of(packed, blocks[b] + 4);
    }
    if (lines() > kTileRows)
      multiply<N, true>(cursors);
    else
      multiply<N, false>(cursors);
    for (int b = 0; b < N; ++b)
      for (int64_t row = 0; row < rows; ++row)
        put(call, packed, blocks[b], first + row,
            finished<Format>(packed, blocks[b], sums + b * 2048 + row * Format::kLines * 64, 64, scales[row]));
  }

  template <int N, bool kLower>
  void multiply(typename Format::Cursor (&cursors)[N]) const {
    const int64_t tiles = packed.head.tiles, upper_bytes = std::min(lines(), kTileRows) * 64;
    const uint8_t *upper = prepared, *lower = prepared + kTileRows * 64 * tiles, *unpacked[kRing][N];
    TILE_ZERO(0);
    if (N > 1) TILE_ZERO(1);
    if (kLower) TILE_ZERO(2);
    if (kLower && N > 1) TILE_ZERO(3);
    for (int64_t tile = 0; tile < tiles + kLag; ++tile) {
      if (tile < tiles)
#pragma GCC unroll 2
        for (int b = 0; b < N; ++b)
          unpacked[tile % kRing][b] = cursors[b].next_tile(ring + (tile % kRing * N + b) * 1024);
      if (tile < kLag) continue;
      const auto& w = unpacked[(tile - kLag) % kRing];
      TILE_LOAD(4, upper, 64);
      if (kLower) TILE_LOAD(5, lower, 64);
      upper += upper_bytes, lower += (lines() - kTileRows) * 64;
      TILE_LOAD(6, w[0], 64);
      if (N > 1) TILE_LOAD(7, w[N - 1], 64);
      product<N, kLower>();
    }
    TILE_STORE(0, sums, 64);
    if (N > 1) TILE_STORE(1, sums + 2048, 64);
    if (kLower) TILE_STORE(2, sums + 1024, 64);
    if (kLower && N > 1) TILE_STORE(3, sums + 2048 + 1024, 64);
  }

  template <int N, bool kLower>
  static void product() {
    if constexpr (Format::kWidth == 2) {
      TILE_BF16(0, 4, 6);
      if (N > 1) TILE_BF16(1, 4, 7);
      if (kLower) TILE_BF16(2, 5, 6);
      if (kLower && N > 1) TILE_BF16(3, 5, 7);
    } else {
      TILE_INT8(0, 4, 6);
      if (N > 1) TILE_INT8(1, 4, 7);
      if (kLower) TILE_INT8(2, 5, 6);
      if (kLower && N > 1) TILE_INT8(3, 5, 7);
    }
  }
};

}  // namespace
