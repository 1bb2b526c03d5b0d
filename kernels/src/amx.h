// AMX tiles, as instructions or as a model in plain C++ that does what they do, fault for fault.
//
// The model runs in every test, over the very source that the instructions are compiled from;
// `tests/kernels/test_bochs.py` runs the instructions on an emulated processor and has the same bits from both.
// On a processor with AMX tests/kernels run the instructions themselves, and the permission call of levels.cc.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if EFFC_LEVEL == 4
#include <immintrin.h>
#ifdef EFFC_ALONE  // nobody else shapes tiles: for an emulator that has no sttilecfg
#define TILE_FOUND(at) std::memset(at, 0, sizeof(TileShapes))
#else
#define TILE_FOUND(at) _tile_storeconfig(at)
#endif
#define TILE_CONFIGURE(at) _tile_loadconfig(at)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(c) _tile_zero(c)
#define TILE_LOAD(t, at, stride) _tile_loadd(t, at, stride)
#define TILE_STORE(t, at, stride) _tile_stored(t, at, stride)
#define TILE_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_INT8(c, a, b) _tile_dpbusd(c, a, b)
#else
#define TILE_FOUND(at) model.found(at)
#define TILE_CONFIGURE(at) model.configure(at)
#define TILE_RELEASE() model.release()
#define TILE_ZERO(c) model.zero(c)
#define TILE_LOAD(t, at, stride) model.load(t, at, stride)
#define TILE_STORE(t, at, stride) model.store(t, at, stride)
#define TILE_BF16(c, a, b) model.bf16(c, a, b)
#define TILE_INT8(c, a, b) model.int8(c, a, b)
#endif

namespace {

// The operand of ldtilecfg.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "as the instruction reads it");

#if EFFC_LEVEL != 4
struct TileModel {
  bool configured = false;
  TileShapes shapes;
  uint8_t data[8][16][64];

  static void fault_unless(bool fine) {
    if (!fine) __builtin_trap();  // as the processor would: an invalid tile operation ends the process
  }
  void configure(const void* at) {
    std::memcpy(&shapes, at, sizeof shapes);
    fault_unless(shapes.palette == 1 && shapes.start_row == 0);
    for (int t = 0; t < 16; ++t) {
      fault_unless(shapes.rows[t] <= 16 && shapes.column_bytes[t] <= 64);
      fault_unless((shapes.rows[t] == 0) == (shapes.column_bytes[t] == 0));
      fault_unless(t < 8 || shapes.rows[t] == 0);
    }
    configured = true;
    std::memset(data, 0, sizeof data);
  }
  void release() { configured = false; }
  void found(void* at) const {
    if (configured)
      std::memcpy(at, &shapes, sizeof shapes);
    else
      std::memset(at, 0, sizeof shapes);
  }
  void use(int t) const { fault_unless(configured && t >= 0 && t < 8 && shapes.rows[t] > 0); }
  void zero(int t) {
    use(t);
    std::memset(data[t], 0, sizeof data[t]);
  }
  void load(int t, const void* at, int64_t stride) {
    zero(t);
    for (int row = 0; row < shapes.rows[t]; ++row)
      std::memcpy(data[t][row], static_cast<const uint8_t*>(at) + row * stride, shapes.column_bytes[t]);
  }
  void store(int t, void* at, int64_t stride) const {
    use(t);
    for (int row = 0; row < shapes.rows[t]; ++row)
      std::memcpy(static_cast<uint8_t*>(at) + row * stride, data[t][row], shapes.column_bytes[t]);
  }
  void fit(int c, int a, int b) const {
    use(c), use(a), use(b);
    fault_unless(c != a && c != b && a != b && shapes.rows[c] == shapes.rows[a]);
    fault_unless(shapes.column_bytes[c] == shapes.column_bytes[b] &&
                 shapes.rows[b] * 4 == shapes.column_bytes[a]);
  }
  static float flushed(float value) {
    return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value;
  }
  static float half(const uint8_t* at) {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return flushed(from_bf16(bits));
  }
  // Even and odd inputs run in two chains of fused products from zero; their sum is added last. Subnormal
  // numbers are zero, before and after.
  void bf16(int c, int a, int b) {
    fit(c, a, b);
    for (int row = 0; row < shapes.rows[c]; ++row)
      for (int column = 0; column < shapes.column_bytes[c] / 4; ++column) {
        float chain[2] = {0, 0}, sum;
        for (int k = 0; k < shapes.rows[b]; ++k)
          for (int i = 0; i < 2; ++i)
            chain[i] = flushed(std::fmaf(half(data[a][row] + 4 * k + 2 * i),
                                         half(data[b][k] + 4 * column + 2 * i), chain[i]));
        std::memcpy(&sum, data[c][row] + 4 * column, 4);
        sum = flushed(flushed(sum) + flushed(chain[0] + chain[1]));
        std::memcpy(data[c][row] + 4 * column, &sum, 4);
      }
  }
  void int8(int c, int a, int b) {
    fit(c, a, b);
    for (int row = 0; row < shapes.rows[c]; ++row)
      for (int column = 0; column < shapes.column_bytes[c] / 4; ++column) {
        int32_t sum;
        std::memcpy(&sum, data[c][row] + 4 * column, 4);
        for (int k = 0; k < shapes.rows[b]; ++k)
          for (int i = 0; i < 4; ++i)
            sum += data[a][row][4 * k + i] * static_cast<int8_t>(data[b][k][4 * column + i]);
        std::memcpy(data[c][row] + 4 * column, &sum, 4);
      }
  }
};
thread_local TileModel model;
#endif

// A thread's tiles while it multiplies. Others (oneDNN, ggml) shape a thread's tiles once and believe that they
// stay so: what was found is put back. Their contents are zero then, as the instruction has it.
struct TileUse {
  TileShapes before;
  TileUse() { TILE_FOUND(&before); }
  ~TileUse() {
    if (before.palette)
      TILE_CONFIGURE(&before);
    else
      TILE_RELEASE();
  }
  TileUse(const TileUse&) = delete;
};

// Rows of x as bytes, `stride` apart.
struct TileRows {
  const uint8_t* at;
  int64_t stride, count;
};

// Prepared rows lie as tiles: 16 rows, or as many as are left, tile after tile, and in a tile row after row.
// A tile is then one run of memory; read at the stride of rows, which is often a power of two, its lines would
// fall into the same few sets of a cache.
constexpr int64_t kTileRows = 16;
inline void lay_in_tiles(const uint8_t* row, int64_t tiles, int64_t rows, uint8_t* into) {
  for (int64_t tile = 0; tile < tiles; ++tile) std::memcpy(into + tile * rows * 64, row + tile * 64, 64);
}

// Sums 0 and 1 of the upper 16 rows, 2 and 3 of the lower, for two blocks of outputs; x in 4 and 5, weights
// in 6, 7.
inline void shape_tiles(int upper, int lower) {
  TileShapes shapes;
  const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int t = 0; t < 8; ++t) {
    shapes.rows[t] = static_cast<uint8_t>(rows[t]);
    shapes.column_bytes[t] = rows[t] ? 64 : 0;
  }
  TILE_CONFIGURE(&shapes);
}

// Weights that come next, to be in a near cache by then: `lines` of each of N streams for each tile.
template <int N>
struct Soon {
  const uint8_t* at[N];
  int64_t lines;
  void fetch() {
    for (int b = 0; b < N; ++b)
      for (int64_t i = 0; i < lines; ++i, at[b] += 64) ahead(at[b]);
  }
};

// Up to 32 rows by one or two blocks of outputs. upper, lower: tiles of x, a tile after the other; blocks[b]:
// tiles of weights; sums [b][row] of 64 bytes, blocks `between` apart.
template <class Number, int N>
void tile_product(const uint8_t* const* blocks, int64_t tiles, const uint8_t* upper, int64_t upper_bytes,
                  const uint8_t* lower, int64_t lower_bytes, uint8_t* sums, int64_t between, bool again,
                  Soon<N>& soon) {
  uint8_t *const right = sums + between, *const below = sums + 16 * 64, *const corner = right + 16 * 64;
  if (again) {
    TILE_LOAD(0, sums, 64);
    if (N > 1) TILE_LOAD(1, right, 64);
    if (lower) TILE_LOAD(2, below, 64);
    if (lower && N > 1) TILE_LOAD(3, corner, 64);
  } else {
    TILE_ZERO(0);
    if (N > 1) TILE_ZERO(1);
    if (lower) TILE_ZERO(2);
    if (lower && N > 1) TILE_ZERO(3);
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    TILE_LOAD(4, upper + upper_bytes * tile, 64);
    if (lower) TILE_LOAD(5, lower + lower_bytes * tile, 64);
    TILE_LOAD(6, blocks[0] + 1024 * tile, 64);
    if (N > 1) TILE_LOAD(7, blocks[N - 1] + 1024 * tile, 64);
    soon.fetch();
    if constexpr (Number::kWidth == 2) {
      TILE_BF16(0, 4, 6);
      if (N > 1) TILE_BF16(1, 4, 7);
      if (lower) TILE_BF16(2, 5, 6);
      if (lower && N > 1) TILE_BF16(3, 5, 7);
    } else {
      TILE_INT8(0, 4, 6);
      if (N > 1) TILE_INT8(1, 4, 7);
      if (lower) TILE_INT8(2, 5, 6);
      if (lower && N > 1) TILE_INT8(3, 5, 7);
    }
  }
  TILE_STORE(0, sums, 64);
  if (N > 1) TILE_STORE(1, right, 64);
  if (lower) TILE_STORE(2, below, 64);
  if (lower && N > 1) TILE_STORE(3, corner, 64);
}

// All rows, 32 at a time, over tiles `from` on of x; the last ones have tiles with fewer rows. The sums of 32 rows lie in
// `slots` turns, 2 KiB apart, behind `sums`. done(row, count, sums) follows each 32, after the next product has begun:
// what a tile stored a moment ago can't be loaded at once.
template <class Number, int N, class Done>
void tile_rows(const uint8_t* const* blocks, int64_t from, int64_t tiles, const TileRows& x, uint8_t* sums,
               int64_t slots, int64_t between, Soon<N>& soon, Done done) {
  const auto at_row = [&](int64_t row) { return sums + row / 32 % slots * 2048; };
  for (int64_t row = 0; row < x.count; row += 32) {
    const int left = static_cast<int>(std::min<int64_t>(32, x.count - row)), upper = std::min(left, 16);
    const int64_t under = left - upper;
    if (row == 0 || left < 32) shape_tiles(upper, left - upper);
    const uint8_t* const at = x.at + row * x.stride;
    const uint8_t* const below = under ? at + 16 * x.stride + from * under * 64 : nullptr;
    tile_product<Number, N>(blocks, tiles, at + from * upper * 64, upper * 64, below, under * 64, at_row(row), between,
                            from > 0, soon);
    if (row > 0) done(row - 32, 32, at_row(row - 32));
  }
  const int64_t last = (x.count - 1) / 32 * 32;
  done(last, x.count - last, at_row(last));
}

}  // namespace
