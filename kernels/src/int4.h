// A stream of int4 codes with a scale for each output and group of inputs.
//
// x is rounded to int8 group by group, so that both scales of a group are known when its int32 sum, which is
// exact, is. Groups are added in float32, each by one fused step and the first first, whatever the level and the
// number of rows: all give the same bits.
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

#if EFFC_TILES

constexpr int kTileInputs = 64;

// Sums in tiles 0 and 1 by turns, x in 2 and 3, weights in 4 and 5.
inline void shape_group_tiles(int rows, int inputs) {
  TileShapes shapes;
  for (int t = 0; t < 6; ++t) {
    shapes.rows[t] = static_cast<uint8_t>(t < 4 ? rows : inputs / 4);
    shapes.column_bytes[t] = static_cast<uint8_t>(t == 2 || t == 3 ? inputs : 64);
  }
  TILE_CONFIGURE(&shapes);
}

// The exact sums of up to 16 rows and one block over one group, into `into` [row] of 64 bytes. Numbers of tiles are
// part of the instructions' names.
#define EFFC_GROUP_PRODUCT(name, sum, left, right)                                                          \
  inline void name(const uint8_t* x, int64_t stride, const uint8_t* w, int64_t group, uint8_t* into) {     \
    TILE_ZERO(sum);                                                                                         \
    for (int64_t i = 0; i < group; i += kTileInputs) {                                                      \
      TILE_LOAD(left, x + i, stride);                                                                       \
      TILE_LOAD(right, w + 16 * i, 64);                                                                     \
      TILE_SIGNED(sum, left, right);                                                                        \
    }                                                                                                       \
    TILE_STORE(sum, into, 64);                                                                              \
  }
EFFC_GROUP_PRODUCT(group_product, 0, 2, 4)
EFFC_GROUP_PRODUCT(next_group_product, 1, 3, 5)

#endif

// How a panel holds weights that meet many rows. Where bytes without a sign are multiplied by bytes with one at once,
// x is code + 128 and the panel has code - zero: what is too much is the same for all rows. Elsewhere codes of 0..15
// are cheaper to multiply, and what their zeros have too much depends on the row.
constexpr bool kShifted = EFFC_LEVEL == 3;
constexpr int64_t kSides = 8192;  // bytes of codes in a panel; behind them each group's excess, or zeros, and scales

struct Int4 {
  using Sum = Floats;
  static constexpr int kWidth = 2, kLines = 1;
  static constexpr bool kGrouped = true;
  static constexpr bool kRareUpper = false;
  static constexpr int64_t kTilesFrom = kFewRows;
  static constexpr int64_t kAhead = 8192;
  static Sum none() { return no_floats(); }
  static Sum load_sum(const uint8_t* at) { return load_floats(reinterpret_cast<const float*>(at)); }
  static void store_sum(uint8_t* at, Sum sum) { store(reinterpret_cast<float*>(at), sum); }
  static void ahead_of(const Packed&, int64_t) {}
  static Floats finish(const Packed&, int64_t, const Sum* sums, float) { return sums[0]; }

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

  // Codes as vectors of bytes, less their zeros for tiles and where x is shifted; but for tiles, sides behind them.
  struct Cursor {
    static constexpr bool kCentred = kShifted || EFFC_TILES;
    const Packed* packed = nullptr;
    int64_t block = 0, tile = 0;
    Cursor() = default;
    Cursor(const Packed& packed, int64_t block) : packed(&packed), block(block) {}
    const uint8_t* vectors(int64_t tiles, uint8_t* into) {
      const Header& head = packed->head;
      const int64_t lines = group_of(head) / 8;
      const uint8_t* at = packed->stream(block) + codes_at(head) + 64 * lines * tile;
      uint8_t* to = into;
      [[maybe_unused]] uint8_t* side = into + kSides;
      for (const int64_t end = tile + tiles; tile < end; ++tile) {
        const GroupScales own(*packed, block, tile);
        Ints sum = no_ints();
        for (int64_t line = 0; line < lines; ++line, at += 64, to += 128) {
          ahead(at + kAhead);
          Vec low = low_halves(load(at)), high = high_halves(load(at));
          if constexpr (kCentred) low = minus_zeros(low, own.zero), high = minus_zeros(high, own.zero);
          if constexpr (kShifted) dot4(sum, low, 0x01010101), dot4(sum, high, 0x01010101);
          store(to, low);
          store(to + 64, high);
        }
#if !EFFC_TILES
        store(reinterpret_cast<int32_t*>(side), kShifted ? times_short(sum, -128 & 0xffff) : own.zero);
        store(reinterpret_cast<float*>(side + 64), own.scale);
        side += 128;
#endif
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

#if EFFC_TILES
  // All rows, 16 at a time.
  template <int N>
  static void tile_groups(const Packed& packed, int64_t block, const uint8_t* const* blocks, int64_t from, int64_t tiles,
                   const TileRows& x, uint8_t* sums, int64_t between) {
    const int64_t group = group_of(packed.head), step = group + 8;
    const int inputs = static_cast<int>(std::min<int64_t>(group, kTileInputs));
    alignas(64) uint8_t whole[2][16 * 64];
    alignas(64) float scales[N][16][16];  // a panel has at most 16 groups
    for (int b = 0; b < N; ++b)
      for (int64_t tile = 0; tile < tiles; ++tile)
        store(scales[b][tile], GroupScales(packed, block + b, from + tile).scale);
    for (int64_t row = 0; row < x.count; row += 16) {
      const int count = static_cast<int>(std::min<int64_t>(16, x.count - row));
      if (row == 0 || count < 16) shape_group_tiles(count, inputs);
      const uint8_t* own_x = x.at + row * x.stride;
      for (int b = 0; b < N; ++b) {
        uint8_t* own = sums + b * between + 64 * row;
        Floats all_sums[16];
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) all_sums[m] = from > 0 ? load_sum(own + 64 * m) : none();
        group_product(own_x, x.stride, blocks[b], group, whole[0]);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          // The tiles of the next group are multiplied while the sums of this one are added.
          const uint8_t *next_x = own_x + (tile + 1) * step, *next_w = blocks[b] + (tile + 1) * group * 16;
          if (tile + 1 < tiles && tile % 2) group_product(next_x, x.stride, next_w, group, whole[0]);
          if (tile + 1 < tiles && tile % 2 == 0) next_group_product(next_x, x.stride, next_w, group, whole[1]);
          const Floats scale = load_floats(scales[b][tile]);
          const uint8_t *found = whole[tile % 2], *x_scale = own_x + tile * step + group;
#pragma GCC unroll 16
          for (int m = 0; m < 16; ++m) {
            const int64_t read = m < count ? m : 0;  // a row that is there
            const Ints sum = load_ints(reinterpret_cast<const int32_t*>(found + 64 * m));
            all_sums[m] =
                rounded_once(to_floats(sum), times(scale, all(scale_of(word(x_scale + read * x.stride)))), all_sums[m]);
          }
        }
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m)
          if (m < count) store_sum(own + 64 * m, all_sums[m]);
      }
    }
  }
#endif

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

}  // namespace
