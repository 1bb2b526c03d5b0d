// bfloat16 weights kept or dropped 16 outputs by 2 inputs at a time: a kept vector needs no expansion, only
// the number of its group. For layers with few weights left.
#pragma once
#include "linear.h"

namespace {

struct Blocks : Bf16 {
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
  };

  template <int M>
  static void rows(const Packed& packed, int64_t block, const uint32_t* words, Sum (&sums)[M]) {
    constexpr int kChains = chains_for(M);
    Sum chains[kChains][M];
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) chains[c][m] = none();
    const Cursor cursor(packed, block);
    const uint8_t* at = cursor.at;
    uint16_t numbers[kChains];
    int64_t i = 0;
    for (; i + kChains <= cursor.left; i += kChains) {
      std::memcpy(numbers, cursor.numbers + 2 * i, sizeof numbers);
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c, at += 64) {
        ahead(at + kAhead);
        const Vec w = load(at);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) dot(chains[c][m], w, words[numbers[c] * M + m]);
      }
    }
    for (; i < cursor.left; ++i, at += 64) {
      std::memcpy(numbers, cursor.numbers + 2 * i, 2);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) dot(chains[0][m], load(at), words[numbers[0] * M + m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) sums[m] = plus(sums[m], chains[c][m]);
  }
};

}  // namespace
