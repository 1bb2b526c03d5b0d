// A stream of tiles: 16 masks, then the weights that they name.
#pragma once
#include "linear.h"

namespace {

template <class Number>
struct Masks;
template <>
struct Masks<Bf16> {
  static constexpr int kBytes = 4;
  static uint64_t read(const uint8_t* at) { return word(at); }
  static Vec expand(uint64_t mask, const uint8_t* values) {
    return expand2(static_cast<uint32_t>(mask), values);
  }
};
template <>
struct Masks<Int8> {
  static constexpr int kBytes = 8;
  static uint64_t read(const uint8_t* at) { return wide(at); }
  static Vec expand(uint64_t mask, const uint8_t* values) { return expand4(mask, values); }
};

template <class Number>
struct Sparse : Number {
  using typename Number::Sum;
  using Mask = Masks<Number>;

  // The next vector of a tile; the values it used are behind it afterwards.
  static Vec next(const uint8_t* masks, int row, const uint8_t*& values) {
    const uint64_t mask = Mask::read(masks + row * Mask::kBytes);
    const Vec w = Mask::expand(mask, values);
    values += Number::kWidth * __builtin_popcountll(mask);
    return w;
  }

  // Weights of a tile. Where few are left it is expanding that takes the time, not memory, and a tile that
  // need not wait for sixteen steps through the one before made it a sixth faster.
  static int64_t kept(const uint8_t* masks) {
    int64_t sums[4] = {};
#pragma GCC unroll 16
    for (int i = 0; i < 2 * Mask::kBytes; ++i) sums[i % 4] += __builtin_popcountll(wide(masks + 8 * i));
    return sums[0] + sums[1] + (sums[2] + sums[3]);
  }

  static constexpr bool kUnpacked = true;
  static constexpr int64_t kSoon = 2048;  // bytes ahead in a stream of tiles; 8192 lost a tenth of the bandwidth
  static constexpr int64_t kAhead = 8192;

  struct Cursor {
    const uint8_t* at = nullptr;
    int64_t lines = 0;  // of a tile of this block, and one
    Cursor() = default;
    Cursor(const Packed& packed, int64_t block) : at(packed.stream(block)) {
      lines = (packed.offset(block + 1) - packed.offset(block)) / packed.head.tiles / 64 + 2;
    }
    // A tile that is multiplied soon.
    const uint8_t* next_tile(uint8_t* into) {
      const uint8_t* masks = at;
      at += 16 * Mask::kBytes;
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) store(into + 64 * row, next(masks, row, at));
      for (int64_t line = 0; line < lines; ++line) ahead(masks + kSoon + 64 * line);
      return into;
    }
    const uint8_t* vectors(int64_t tiles, uint8_t* into) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint8_t* masks = at;
        ahead(masks + kAhead);
        at += 16 * Mask::kBytes;
#pragma GCC unroll 4
        for (int row = 0; row < 16; ++row) {
          if (row % 2 == 0) ahead(at + kAhead);
          store(into + 1024 * tile + 64 * row, next(masks, row, at));
        }
      }
      return into;
    }
  };

  // Prefetches at the rate at which bytes are used up: one for every `Step` vectors. The distance is what
  // hides a cache miss behind the expansion; 1 or 2 KiB left a quarter of the bandwidth unused.
  template <int M, int Step>
  static void stream(const Packed& packed, int64_t block, const uint32_t* words, Sum (&sums)[M]) {
    constexpr int64_t kAhead = Step >= 4 ? 4096 : Sparse::kAhead;
    Chains<Number, M> chains;
    const uint8_t* at = packed.stream(block);
    for (int64_t tile = 0; tile < packed.head.tiles; ++tile, words += 16 * M) {
      const uint8_t* masks = at;
      ahead(masks + kAhead);
      if (Mask::kBytes == 8) ahead(masks + kAhead + 64);
      const uint8_t* values = at + 16 * Mask::kBytes;
      if (Step >= 4) at = values + Number::kWidth * kept(masks);
      for (int row = 0; row < 16; row += chains.kCount)
#pragma GCC unroll 8
        for (int c = 0; c < chains.kCount; ++c) {
          if ((row + c) % Step == 0) ahead(values + kAhead);
          const Vec w = next(masks, row + c, values);
          chains.take(c, w, words + (row + c) * M);
        }
      if (Step < 4) at = values;
    }
    chains.add_to(sums);
  }

  template <int M>
  static void rows(const Packed& packed, int64_t block, const uint32_t* words, Sum (&sums)[M]) {
    const int64_t bytes = packed.offset(block + 1) - packed.offset(block), whole = packed.head.tiles * 1024;
    if constexpr (M > 2)
      stream<M, 2>(packed, block, words, sums);  // the products take longer than the memory
    else if (4 * bytes > 3 * whole)
      stream<M, 1>(packed, block, words, sums);
    else if (16 * bytes > 5 * whole)
      stream<M, 2>(packed, block, words, sums);
    else
      stream<M, 4>(packed, block, words, sums);
  }
};

}  // namespace
