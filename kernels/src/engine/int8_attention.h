// Attention over a cache of int8, at the level of this compilation: codes times queries, and weights times codes, that
// keep 16 bits. Their sums are exact int32, so what the cache rounds is all that is lost.
#pragma once
#include "../attention.h"

#include "int8_block.h"
#include "steps.h"

namespace engine {
namespace {

constexpr int64_t kAhead = 8192;  // bytes: each line of a block asks for the one so far behind it, or some come late
constexpr float kMostShort = 32639.0f;  // as in `Int8Int16`

// Codes -127..127 of some numbers. Returns the scale that they share: up to bfloat16, so that no code grows beyond;
// 0 for zeros, NaN where one is inf or NaN.
inline uint16_t round_to_bytes(const float* x, int64_t count, uint8_t* bytes) {
  const float most = largest(x, 1, 0, count);
  if (!(most > kLeast)) {
    std::memset(bytes, 0, count);
    return to_bf16(most - most);
  }
  const float exact = most / 127.0f;
  const auto scale = static_cast<uint16_t>((word(&exact) + 0xffff) >> 16);
  codes(x, 1, 0, count, 1.0f / from_bf16(scale), 0, bytes);
  return scale;
}

// Numbers as codes of 16 bits with one scale, a multiple of four of them, each four in two words as `dot_short` takes
// them.
struct Shorts {
  alignas(64) uint8_t high[kMostHead], low[kMostHead];
  float scale;

  void round(const float* x, int64_t count) {
    const float most = largest(x, 1, 0, count);
    const bool any = most > kLeast;
    scale = any ? most / kMostShort : most - most;
    const int64_t whole = (count + kScaleGroup - 1) / kScaleGroup * kScaleGroup;
    std::memset(high, 128, whole);
    std::memset(low, 128, whole);
    if (any) halves(x, 1, 0, count, kMostShort / most, 128, high, low);
  }
  int32_t code(int64_t i) const { return 256 * (high[i] - 128) + low[i] - 128; }
  void words(int64_t first, uint32_t (&pair)[2]) const {
    if (kSplitShorts) {
      pair[0] = word(high + first) ^ 0x80808080u;
      pair[1] = word(low + first) ^ 0x80808080u;
    } else {
      for (int i = 0; i < 2; ++i)
        pair[i] = (code(first + i) & 0xffff) | static_cast<uint32_t>(code(first + i + 2)) << 16;
    }
  }
  // What sums of 32 of them are too large by.
  int32_t excess(int64_t first) const {
    int32_t sum = 0;
    for (int64_t i = first; kBytesGain && i < first + kScaleGroup; ++i) sum += code(i);
    return kBytesGain * sum;
  }
};

// Weights of 32 values as codes of 16 bits with one scale.
struct Shares {
  uint32_t words[2][8];
  float scale;
  int32_t excess;  // what a sum of 32 of them is too large by

  void round(Floats first, Floats second) {
#if defined(__AVX512VNNI__)
    const int32_t bits = top(larger_magnitude(larger_magnitude(no_ints(), first), second));
    float most;
    std::memcpy(&most, &bits, 4);
    const bool any = most > kLeast && most - most == 0;
    scale = any ? most / kMostShort : most - most;
    const Floats inverse = all(any ? kMostShort / most : 0.0f);
    const Ints codes = nearest(times(first, inverse)), more = nearest(times(second, inverse));
    store_shorts(words, codes, more);
    excess = any ? 128 * total(plus(codes, more)) : 0;
#else
    alignas(64) float numbers[kTokens];
    store(numbers, first);
    store(numbers + 16, second);
    Shorts shorts;
    shorts.round(numbers, kTokens);
    scale = shorts.scale;
    excess = shorts.excess(0);
    for (int row = 0; row < 8; ++row) {
      uint32_t pair[2];
      shorts.words(4 * row, pair);
      words[0][row] = pair[0];
      words[1][row] = pair[1];
    }
#endif
  }
};

template <int M>
struct Int8Attention {
  // Keys of 16 tokens, or lanes of values, whose sums are in registers together.
  static constexpr int kTogether = kSums >= 16 && M <= 4 ? 2 : 1;

  const Int8Block lies;
  uint32_t queries[kMostHead / 4][M][2];
  int32_t excess[kMostHead / kScaleGroup][M];
  float scales[M];

  Int8Attention(int64_t head_dim, int64_t value_dim) : lies(head_dim, value_dim) {}

  void take_query(int m, const float* q, int64_t head_dim) {
    Shorts shorts;
    shorts.round(q, head_dim);
    scales[m] = shorts.scale;
    for (int64_t i = 0; i < 8 * lies.groups; ++i) shorts.words(4 * i, queries[i][m]);
    for (int64_t g = 0; g < lies.groups; ++g) excess[g][m] = shorts.excess(g * kScaleGroup);
  }

  // The products of 32 keys with the queries.
  void score(const uint8_t* block, Floats (&scores)[2][M]) const {
    for (int half = 0; half < 2; ++half)
      for (int m = 0; m < M; ++m) scores[half][m] = no_floats();
    for (int64_t g = 0; g < lies.groups; ++g)
      for (int half = 0; half < 2; half += kTogether) score_group(block, g, half, scores);
    for (int half = 0; half < 2; ++half)
      for (int m = 0; m < M; ++m) scores[half][m] = times(scores[half][m], all(scales[m]));
  }

  void score_group(const uint8_t* block, int64_t g, int first, Floats (&scores)[2][M]) const {
    Ints sums[kTogether][M][2];
#pragma GCC unroll 2
    for (int half = 0; half < kTogether; ++half)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[half][m][0] = sums[half][m][1] = no_ints();
    const uint8_t* keys = block + lies.keys() + first * lies.half() + 512 * g;
    for (int row = 0; row < 8; ++row)
#pragma GCC unroll 2
      for (int half = 0; half < kTogether; ++half) {
        const uint8_t* at = keys + half * lies.half() + 64 * row;
        far_ahead(at + kAhead);
        const Bytes w = load_bytes(at);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) dot_short(sums[half][m], w, queries[8 * g + row][m]);
      }
    const auto* steps = reinterpret_cast<const uint16_t*>(block + 64 * g);
    if (!first) far_ahead(block + 64 * g + kAhead);
#pragma GCC unroll 2
    for (int half = 0; half < kTogether; ++half) {
      const Floats scale = load_halves(steps + 16 * (first + half));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Floats exact = to_floats(minus(joined(sums[half][m]), same(excess[g][m])));
        scores[first + half][m] = plus(scores[first + half][m], times(exact, scale));
      }
    }
  }

  void add_values(const Floats (&weights)[2][M], const uint8_t* block, Running<M>& running) const {
    Shares shares[M];
    const auto* steps = reinterpret_cast<const uint16_t*>(block + lies.value_scales());
    far_ahead(block + lies.value_scales() + kAhead);
    const Floats first = load_halves(steps), second = load_halves(steps + 16);
    for (int m = 0; m < M; ++m) shares[m].round(times(weights[0][m], first), times(weights[1][m], second));
    keep_in_memory(shares);
    int64_t lane = 0;
    for (; lane + kTogether <= lies.lanes; lane += kTogether) add_lanes<kTogether>(block, lane, shares, running);
    for (; lane < lies.lanes; ++lane) add_lanes<1>(block, lane, shares, running);
  }

  template <int kLanes>
  void add_lanes(const uint8_t* block, int64_t first, const Shares (&shares)[M], Running<M>& running) const {
    const uint8_t* at = block + lies.values() + 512 * first;
    Ints sums[kLanes][M][2];
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; ++lane)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[lane][m][0] = sums[lane][m][1] = no_ints();
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row)
#pragma GCC unroll 2
      for (int lane = 0; lane < kLanes; ++lane) {
        far_ahead(at + 512 * lane + 64 * row + kAhead);
        const Bytes w = load_bytes(at + 512 * lane + 64 * row);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) dot_short(sums[lane][m], w, {shares[m].words[0][row], shares[m].words[1][row]});
      }
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; ++lane)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        float* values = running.values + ((first + lane) * M + m) * 16;
        const Floats exact = to_floats(minus(joined(sums[lane][m]), same(shares[m].excess)));
        store(values, plus(load_floats(values), times(exact, all(shares[m].scale))));
      }
  }
};

// One token of one head.
inline void append_int8(const Int8Block& lies, const float* k, int64_t head_dim, const float* v, int64_t value_dim,
                        int64_t token, uint8_t* block) {
  uint8_t bytes[kMostHead];
  uint8_t* keys = block + lies.keys() + token / 16 * lies.half() + token % 16 * 4;
  for (int64_t g = 0; g < lies.groups; ++g) {
    const int64_t first = g * kScaleGroup, count = std::min(kScaleGroup, head_dim - first);
    const uint16_t scale = round_to_bytes(k + first, count, bytes);
    std::memcpy(block + 64 * g + 2 * token, &scale, 2);
    for (int64_t i = 0; i < count; ++i) keys[(first + i) / 4 * 64 + i % 4] = bytes[i];
  }
  const uint16_t scale = round_to_bytes(v, value_dim, bytes);
  std::memcpy(block + lies.value_scales() + 2 * token, &scale, 2);
  uint8_t* values = block + lies.values() + token / 4 * 64 + token % 4;
  for (int64_t i = 0; i < value_dim; ++i) values[i / 16 * 512 + i % 16 * 4] = bytes[i];
}

}  // namespace
}  // namespace engine
