// A stream of int4 codes with a scale for each output and group of inputs.
//
// x is rounded to int8 group by group, so that both scales of a group are known when its int32 sum, which is
// exact, is. Groups are added in float32, each by one fused step and the first first, whatever the level and the
// number of rows: all give the same bits. But for tiles, which many rows meet as bfloat16.
#pragma once
#include "linear.h"

namespace {

// What a block has beside codes, at one of its tiles.
struct GroupScales {
  Floats scale;
  Ints zero;
  GroupScales(const Packed& packed, int64_t block, int64_t tile) {
    const uint8_t* at = packed.stream(block);
    scale = load_halves(reinterpret_cast<const uint16_t*>(at) + 16 * tile);
    zero = has_zeros(packed.head) ? load_zeros(at + 32 * packed.head.tiles + 8 * tile) : same(8);
  }
  // What products with codes instead of code - zero have too much, by the sum of x with its sign turned.
  Ints excess(uint32_t minus_sum) const { return times_short(zero, minus_sum); }
};

inline float scale_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// How a panel holds weights that meet many rows. Where bytes without a sign are multiplied by bytes with one at once,
// x is code + 128 and the panel has code - zero: what is too much is the same for all rows. Elsewhere codes of 0..15
// are cheaper to multiply, and what their zeros have too much depends on the row.
constexpr bool kShifted = EFFC_LEVEL == 3;
constexpr int64_t kSides = 8192;  // bytes of codes in a panel; behind them each group's excess, or zeros, and scales

struct Int4 {
  using Sum = Floats;
  using Outputs = SumsAsOutputs;
  static constexpr int kWidth = 2, kLines = 1;
  static constexpr bool kGrouped = true;
  static constexpr bool kRareUpper = false;
  static constexpr int64_t kTilesFrom = kFewRows;
  static constexpr int64_t kAhead = 8192;
  static Sum none() { return no_floats(); }
  static Sum load_sum(const uint8_t* at) { return load_floats(reinterpret_cast<const float*>(at)); }
  static void store_sum(uint8_t* at, Sum sum) { store(reinterpret_cast<float*>(at), sum); }
  static void ahead_of(const Packed&, int64_t) {}

  // Group after group: int8 codes, the float32 scale, and the sum of the codes with its sign turned (in 16 bits).
  static void prepare(const void* x, int32_t x_float, int64_t at, const Header& head, uint8_t* into) {
    const int64_t group = group_of(head), k = head.k, all = head.tiles * group;
    for (int64_t from = 0; from < all; from += group, into += group + 8) {
      const int64_t count = std::min(group, k - from);
      int32_t sum = 0;
      float scale = 0;
#if defined(__AVX512VBMI2__)
      if (count == group)
        sum = round_group(x, x_float, at + from, group, into, scale);
      else
#endif
        sum = round_part(x, x_float, at + from, count, group, into, scale);
      const uint32_t turned = static_cast<uint32_t>(-sum) & 0xffff;
      std::memcpy(into + group, &scale, 4);
      std::memcpy(into + group + 4, &turned, 4);
    }
  }

  static float scale_for(float most) { return most > kLeast ? most / 127.0f : most - most; }  // else 0, or NaN

  // Codes of `count` inputs, zeros behind them. Returns their sum.
  static int32_t round_part(const void* x, int32_t x_float, int64_t at, int64_t count, int64_t group, uint8_t* into,
                            float& scale) {
    const float most = largest(x, x_float, at, count);
    scale = scale_for(most);
    std::memset(into, 0, group);
    if (most > kLeast) codes(x, x_float, at, count, 127.0f / most, 0, into);
    int32_t sum = 0;
    for (int64_t i = 0; i < group; ++i) sum += static_cast<int8_t>(into[i]);
    return sum;
  }

#if defined(__AVX512VBMI2__)
  static Floats inputs(const void* x, int32_t x_float, int64_t at) {
    return x_float ? load_floats(static_cast<const float*>(x) + at) : load_halves(static_cast<const uint16_t*>(x) + at);
  }

  // The same for a group that is whole: loops of a few elements each took a third of the time of narrow layers.
  static int32_t round_group(const void* x, int32_t x_float, int64_t at, int64_t group, uint8_t* into, float& scale) {
    Ints bits = no_ints(), sum = no_ints();
    for (int64_t i = 0; i < group; i += 16) bits = larger_magnitude(bits, inputs(x, x_float, at + i));
    const float found = scale_of(static_cast<uint32_t>(top(bits))), most = found - found == 0 ? found : found - found;
    scale = scale_for(most);
    const Floats inverse = all(most > kLeast ? 127.0f / most : 0);
    for (int64_t i = 0; i < group; i += 16) {
      Ints code = nearest(times(inputs(x, x_float, at + i), inverse));
      if (!(most > kLeast)) code = no_ints();
      sum = plus(sum, code);
      store_bytes(into + i, code);
    }
    return total(sum);
  }
#endif

  // A prepared row as panels want it.
  static void meet_panels(const Header& head, uint8_t* row) {
    if constexpr (!kShifted) return;
    const int64_t group = group_of(head), tiles = head.tiles;  // read once: bytes might be those of a header
    for (int64_t tile = 0; tile < tiles; ++tile, row += group + 8)
      for (int64_t i = 0; i < group; ++i) row[i] ^= 128;
  }

  template <int M>
  static void rows(const Packed& packed, int64_t block, const uint32_t* words, Sum (&sums)[M]) {
    const Header& head = packed.head;
    const uint8_t* at = packed.stream(block) + codes_at(head);
    const int64_t steps = group_of(head) / 4;
    constexpr int kTwo = M <= 4 ? M : 1;
    // The prefetches below pass over the scales of a later block, which are as many bytes as these.
    for (int64_t i = 0; i < codes_at(head); i += 64) ahead(at + kAhead - codes_at(head) + i);
    for (int64_t tile = 0; tile < head.tiles; ++tile, words += (steps + 2) * M) {
      const GroupScales own(packed, block, tile);
      Ints whole[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) whole[m] = own.excess(words[(steps + 1) * M + m]);
      Ints other[kTwo];  // a product waits for the one before it, so few rows have two sums
#pragma GCC unroll 4
      for (int m = 0; m < kTwo; ++m) other[m] = no_ints();
#pragma GCC unroll 4
      for (int64_t step = 0; step < steps; step += 2, at += 64) {
        ahead(at + kAhead);
        const Vec line = load(at), low = low_halves(line), high = high_halves(line);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          dot_codes(whole[m], low, words[step * M + m]);
          dot_codes(M <= 4 ? other[M <= 4 ? m : 0] : whole[m], high, words[(step + 1) * M + m]);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < (M <= 4 ? M : 0); ++m) whole[m] = plus(whole[m], other[m]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        sums[m] = rounded_once(to_floats(whole[m]), times(own.scale, all(scale_of(words[steps * M + m]))), sums[m]);
    }
  }

  // Codes as vectors of bytes, less their zeros where x is shifted; sides behind them.
  struct Cursor {
    const Packed* packed = nullptr;
    int64_t block = 0, tile = 0;
    Cursor() = default;
    Cursor(const Packed& packed, int64_t block) : packed(&packed), block(block) {}
    const uint8_t* vectors(int64_t tiles, uint8_t* into) {
      const Header& head = packed->head;
      const int64_t lines = group_of(head) / 8;
      const uint8_t* at = packed->stream(block) + codes_at(head) + 64 * lines * tile;
      uint8_t* to = into;
      uint8_t* side = into + kSides;
      for (const int64_t end = tile + tiles; tile < end; ++tile) {
        const GroupScales own(*packed, block, tile);
        Ints sum = no_ints();
        for (int64_t line = 0; line < lines; ++line, at += 64, to += 128) {
          ahead(at + kAhead);
          Vec low = low_halves(load(at)), high = high_halves(load(at));
          if constexpr (kShifted) {
            low = minus_zeros(low, own.zero), high = minus_zeros(high, own.zero);
            dot4(sum, low, 0x01010101), dot4(sum, high, 0x01010101);
          }
          store(to, low);
          store(to + 64, high);
        }
        store(reinterpret_cast<int32_t*>(side), kShifted ? times_short(sum, -128 & 0xffff) : own.zero);
        store(reinterpret_cast<float*>(side + 64), own.scale);
        side += 128;
      }
      return into;
    }
  };

  // The exact sums of M rows by N blocks over one group, into `into` [M][N] of 64 bytes. A function of its own: beside
  // the steps that scale them the compiler keeps these sums in memory, at half the speed.
  template <int M, int N>
  [[gnu::noinline]] static void group_sums(const uint8_t* const* blocks, int64_t tile, int64_t steps,
                                           const uint32_t* words, uint8_t* into) {
    Ints sums[N][M];
    const uint8_t* at[N];
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) {
      at[b] = blocks[b] + 64 * steps * tile;
      const Ints side = load_ints(reinterpret_cast<const int32_t*>(blocks[b] + kSides + 128 * tile));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[b][m] = kShifted ? side : times_short(side, words[(steps + 1) * M + m]);
    }
    for (int64_t step = 0; step < steps; ++step, words += M) {
      Vec w[N];
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) w[b] = load(at[b] + 64 * step);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int b = 0; b < N; ++b) {
          if constexpr (kShifted)
            dot4(sums[b][m], w[b], words[m]);
          else
            dot_codes(sums[b][m], w[b], words[m]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) store(reinterpret_cast<int32_t*>(into + 64 * (m * N + b)), sums[b][m]);
  }

  // M rows by N blocks of outputs over `tiles` groups from `from` on.
  template <int M, int N>
  static void product(const Packed& packed, const uint8_t* const* blocks, int64_t from, int64_t tiles,
                      const uint32_t* words, uint8_t* sums, int64_t between) {
    const int64_t steps = group_of(packed.head) / 4;
    alignas(64) uint8_t whole[M * N * 64];
    for (int64_t tile = 0; tile < tiles; ++tile, words += (steps + 2) * M) {
      group_sums<M, N>(blocks, tile, steps, words, whole);
      Floats scales[N];
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b)
        scales[b] = load_floats(reinterpret_cast<const float*>(blocks[b] + kSides + 128 * tile + 64));
      for (int m = 0; m < M; ++m) {
        const Floats x_scale = all(scale_of(words[steps * M + m]));
#pragma GCC unroll 4
        for (int b = 0; b < N; ++b) {
          uint8_t* own = sums + b * between + 64 * m;
          const Sum before = from + tile > 0 ? load_sum(own) : none();
          const Ints sum = load_ints(reinterpret_cast<const int32_t*>(whole + 64 * (m * N + b)));
          store_sum(own, rounded_once(to_floats(sum), times(scales[b], x_scale), before));
        }
      }
    }
  }

  // The weights of one output as float32.
  static void read_row(const Packed& packed, int64_t row, float* y) {
    const Header& head = packed.head;
    const int64_t block = row / 16, lane = row % 16, group = group_of(head);
    const uint8_t* lines = packed.stream(block) + codes_at(head) + 4 * lane;
    for (int64_t tile = 0; tile < head.tiles; ++tile) {
      const GroupScales own(packed, block, tile);
      float scales[16];
      int32_t zeros[16];
      store(scales, own.scale);
      store(zeros, own.zero);
      for (int64_t i = tile * group; i < std::min(head.k, (tile + 1) * group); ++i) {
        const int32_t code = lines[i / 8 * 64 + i % 4] >> (i % 8 < 4 ? 0 : 4) & 15;
        y[i] = scales[lane] * static_cast<float>(code - zeros[lane]);
      }
    }
  }
};

#if EFFC_TILES

// The weights of a group as bfloat16, code - zero times scale rounded to nearest, for more rows than a stream of codes
// meets at once: int8 sums of groups of 32 inputs would fill half a tile and cost as much again to be scaled.
struct Int4Tiles : Bf16 {
  static constexpr bool kUnpacked = true;
  static constexpr int64_t kAhead = Int4::kAhead;

  // As a weight whose tiles are those of bfloat16.
  static Packed of(const Packed& int4) {
    Packed own = int4;
    own.head.kind = kDenseBf16;
    own.head.tiles = int4.head.tiles * group_of(int4.head) / 32;
    return own;
  }

  struct Cursor {
    const uint8_t* at = nullptr;
    const uint8_t* buffer = nullptr;
    int64_t block = 0, tile = 0, tiles_of_group = 1;
    Floats scale, minus;  // weight = scale * (128 + code) - minus
    Cursor() = default;
    Cursor(const Packed& packed, int64_t block) : buffer(packed.at), block(block) {
      const Packed int4(buffer);
      at = int4.stream(block) + codes_at(int4.head);
      tiles_of_group = group_of(int4.head) / 32;
    }
    const uint8_t* vectors(int64_t tiles, uint8_t* into) {
      for (int64_t i = 0; i < tiles; ++i) next_tile(into + 1024 * i);
      return into;
    }
    const uint8_t* next_tile(uint8_t* into) {
      if (tile % tiles_of_group == 0) {
        const GroupScales own(Packed(buffer), block, tile / tiles_of_group);
        scale = own.scale;
        minus = times(own.scale, plus(to_floats(own.zero), all(128.0f)));
      }
      ++tile;
#pragma GCC unroll 4
      for (int line = 0; line < 4; ++line, at += 64, into += 256) {
        ahead(at + kAhead);
        codes_to_halves(at, scale, minus, into);
      }
      return into - 1024;
    }
  };
};

#endif

}  // namespace
