// How decode attention reads the tiles of a block: as they lie, or unpacked behind their masks.
#pragma once
#include "numbers.h"

namespace {

// The tiles of a block one after another, vector by vector or, on AMX, whole.
struct DenseTiles {
  const uint8_t* at;
  DenseTiles(const uint8_t* at, const uint8_t*, int64_t) : at(at) {}
  void begin() {}
  const uint8_t* tile() {
    const uint8_t* found = at;
#pragma GCC unroll 16
    for (int64_t i = 0; i < 1024; i += 64) ahead(at + 4096 + i);
    at += 1024;
    return found;
  }
  Vec next(int) {
    far_ahead(at + 8192);
    const Vec w = load(at);
    at += 64;
    return w;
  }
};

struct SparseTiles {
  const uint8_t *at, *end, *masks = nullptr;
  int64_t left;  // tiles to come
  SparseTiles(const uint8_t* at, const uint8_t* end, int64_t tiles) : at(at), end(end), left(tiles) {}

#if EFFC_TILES
  alignas(64) uint8_t ring[2][1024];
  int slot = 0;
  // A tile is unpacked while the one before is multiplied: what was stored a moment ago is not handed on to it.
  const uint8_t* tile() {
    if (masks == nullptr) unpack();
    const uint8_t* found = ring[slot];
    slot ^= 1;
    if (left > 0 && at <= end) unpack();
    return found;
  }
  void unpack() {
    --left;
    begin();
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) store(ring[slot] + 64 * row, next(row));
  }
#endif
  void begin() {
    ahead(at + 8192);
    masks = at;
    at += 64;
  }
  Vec next(int row) {
    if (row % 2 == 0) ahead(at + 8192);
    const uint32_t mask = word(masks + 4 * row);
    const Vec w = expand2(mask, at);
    at += 2 * __builtin_popcount(mask);
    return w;
  }
};

}  // namespace
