// A stream of whole vectors.
#pragma once
#include "linear.h"

namespace {

template <class Number>
struct Dense : Number {
  using typename Number::Sum;
  static constexpr bool kUnpacked = false;
  static constexpr int64_t kSoon = 4096;   // of a stream of tiles
  static constexpr int64_t kAhead = 8192;  // bytes; the processor's own prefetch stops at a page

  struct Cursor {
    const uint8_t* at = nullptr;
    Cursor() = default;
    Cursor(const Packed& packed, int64_t block) : at(packed.stream(block)) {}
    const uint8_t* vectors(int64_t tiles, uint8_t*) {
      const uint8_t* here = at;
      at += 1024 * tiles;
      return here;
    }
    // A tile that is multiplied at once.
    const uint8_t* next_tile(uint8_t* into) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 1024; i += 64) ahead(at + kSoon + i);
      return vectors(1, into);
    }
  };

  template <int M>
  static void rows(const Packed& packed, int64_t block, const uint32_t* words, Sum (&sums)[M]) {
    Chains<Number, M> chains;
    const uint8_t* at = packed.stream(block);
    for (int64_t group = 0; group < packed.head.tiles * 16; group += chains.kCount)
#pragma GCC unroll 8
      for (int c = 0; c < chains.kCount; ++c, at += 64) {
        ahead(at + kAhead);
        chains.take(c, load(at), words + (group + c) * M);
      }
    chains.add_to(sums);
  }
};

}  // namespace
