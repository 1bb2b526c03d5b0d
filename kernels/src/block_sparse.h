// bfloat16 weights kept or dropped 16 outputs by 2 inputs at a time: a kept vector needs no expansion, only
// the number of its group. For layers with few weights left.
#pragma once
#include "linear.h"

namespace {

struct Blocks : Bf16 {
  static constexpr bool kUnpacked = true;
  static constexpr int64_t kTilesFrom = kFewRows;
  static constexpr int64_t kAhead = 8192;

  struct Cursor {
    const uint8_t *at = nullptr, *numbers = nullptr;
    int64_t left = 0, begun = 0;
    Cursor() = default;
    Cursor(const Packed& packed, int64_t block) : numbers(packed.stream(block) + 64) {
      left = static_cast<int64_t>(wide(packed.stream(block)));
      at = numbers + ceil_to(2 * left, 64);
    }
    int64_t number() const {
      uint16_t found;
      std::memcpy(&found, numbers, 2);
      return found;
    }
    const uint8_t* vectors(int64_t tiles, uint8_t* into) {
      std::memset(into, 0, 1024 * tiles);
      for (; left > 0 && number() < begun + 16 * tiles; --left, at += 64, numbers += 2)
        std::memcpy(into + 64 * (number() - begun), at, 64);
      begun += 16 * tiles;
      return into;
    }
    const uint8_t* next_tile(uint8_t* into) {
      ahead(at + kAhead);
      return vectors(1, into);
    }
  };

  template <int M>
  static void rows(const Packed& packed, int64_t block, const uint32_t* words, Sum (&sums)[M]) {
    Chains<Bf16, M> chains;
    const Cursor cursor(packed, block);
    const uint8_t *at = cursor.at, *numbers = cursor.numbers;
    const auto take = [&](int c) {
      uint16_t number;
      std::memcpy(&number, numbers, 2);
      ahead(at + kAhead);
      chains.take(c, load(at), words + number * M);
      at += 64, numbers += 2;
    };
    int64_t left = cursor.left;
    for (; left >= chains.kCount; left -= chains.kCount)
#pragma GCC unroll 8
      for (int c = 0; c < chains.kCount; ++c) take(c);
    for (; left > 0; --left) take(0);
    chains.add_to(sums);
  }
};

}  // namespace
