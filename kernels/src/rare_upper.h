// Upper bytes of inputs of 16 bits, nearly all of which are zero, in the product of many rows: of a block of rows only
// the fours of inputs where one of them has others meet their weights.
//
// What is left out counts as zero. Where its code is 128, sums begin with 128 times all weights, as if no four were left
// out, and lose that of the fours that are multiplied. So they are the whole line's sums to the bit.
#pragma once
#include <cstring>

#include "vec.h"

namespace {

constexpr uint32_t kZeroCodes = 0x01010101u * kZeroByte;  // a word of four codes of zero

// The fours of a block of rows that are multiplied, by depth of a panel.
struct UpperFours {
  static constexpr int64_t bytes(int64_t depths, int64_t fours) { return 4 * (depths + 1) + fours; }
  uint8_t* at;      // int32 [depths + 1]: how many there are before each depth; uint8: each, counted from its depth's first
  uint32_t* words;  // [fours][M]
  int64_t depths;

  int32_t before(int64_t depth) const { return static_cast<int32_t>(word(at + 4 * depth)); }
  void set_before(int64_t depth, int32_t count) const { std::memcpy(at + 4 * depth, &count, 4); }
  uint8_t* fours() const { return at + 4 * (depths + 1); }

  // Of `count` upper lines, `stride` bytes from one to the next; up to `depth` fours make a depth.
  template <int M>
  void list(const uint8_t* lines, int64_t bytes, int64_t stride, int64_t count, int64_t depth) const {
    int32_t listed = 0;
    for (int64_t first = 0, d = 0; d < depths; first += depth, ++d) {
      set_before(d, listed);
      for (int64_t four = first; four < std::min(first + depth, bytes / 4); ++four) {
        uint32_t any = 0;
        for (int64_t line = 0; line < count; ++line) any |= word(lines + line * stride + 4 * four) ^ kZeroCodes;
        if (!any) continue;
        fours()[listed] = static_cast<uint8_t>(four - first);
        for (int64_t line = 0; line < M; ++line)
          words[listed * M + line] = line < count ? word(lines + line * stride + 4 * four) : kZeroCodes;
        ++listed;
      }
    }
    set_before(depths, listed);
  }

  // Adds those of one depth to the sums of M rows and N blocks of outputs.
  template <class Format, int M, int N>
  void multiply(int64_t depth, const uint8_t* const* blocks, uint8_t* sums, int64_t between) const {
    const int64_t from = before(depth), to = before(depth + 1);
    if (from == to) return;
    typename Format::Sum excess[N], sum[N][M];
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) excess[b] = Format::none();
    for (int64_t i = from; kZeroByte && i < to; ++i)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) Format::dot(excess[b], load(blocks[b] + 64 * fours()[i]), kZeroCodes);
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[b][m] = minus(Format::load_sum(sums + b * between + 64 * m), excess[b]);
    for (int64_t i = from; i < to; ++i) {
      Vec w[N];
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) w[b] = load(blocks[b] + 64 * fours()[i]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int b = 0; b < N; ++b) Format::dot(sum[b][m], w[b], words[i * M + m]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) Format::store_sum(sums + b * between + 64 * m, sum[b][m]);
  }
};

}  // namespace
