// Products of many shapes by the library's own sources, and a hash of all that they give. Compiled twice: for
// the emulated processor with tile instructions, for this machine with the model of tiles.
//
// The emulator takes the signed bytes of an int8 tile product for unsigned ones, so int8 weights are >= 0
// here; negative ones are tested with the model. Activations have both signs: tiles see them as code + 128.
#pragma once
#include "packing.h"

#include "block_sparse_linear.cc"
#include "dense_linear.cc"
#include "dense_linear_int8.cc"
#include "dense_linear_int8_int16.cc"
#include "sparse_linear.cc"
#include "sparse_linear_int8.cc"

namespace {

constexpr int64_t kMostWeights = 48 * 576, kMostX = 48 * 576, kMostY = 513 * 48, kMostPacked = 1 << 18;

struct Memory {
  alignas(64) float w[kMostWeights], x[kMostX], y[kMostY], bias[48], scales[48];
  alignas(64) uint16_t x_half[kMostX], bias_half[48];
  alignas(64) uint8_t packed[kMostPacked];
  int64_t offsets[4];
};

struct Random {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  // -16..16, small ones as likely as large ones; one in 512 so small that tiles take it for zero.
  float number() {
    const uint32_t drawn = bits();
    const float part = static_cast<float>(static_cast<int32_t>(drawn & 0xffff) - 0x8000) / 32768.0f;
    if ((drawn >> 16 & 511) == 0) return part * 1e-39f;
    return part * static_cast<float>(1 << (drawn >> 25 & 7)) * 0.125f;
  }
};

struct Hash {
  uint64_t value = 0xcbf29ce484222325ull;
  void add(const void* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i)
      value = (value ^ static_cast<const uint8_t*>(at)[i]) * 0x100000001b3ull;
  }
};

struct Kernel {
  const char* name;
  Kind kind;
  int32_t (*run)(const LinearCall&);
};

#define KERNEL(name, kind) Kernel{#name, kind, EFFC_AT_LEVEL(name)}
constexpr Kernel kKernels[] = {
    KERNEL(dense_linear, kDenseBf16),      KERNEL(sparse_linear, kSparseBf16),
    KERNEL(dense_linear_int8, kDenseInt8), KERNEL(sparse_linear_int8, kSparseInt8),
    KERNEL(block_sparse_linear, kBlockBf16), KERNEL(dense_linear_int8_int16, kDenseInt8Int16)};

struct Shape {
  int64_t rows, n, k;
  int percent;  // of the weights that are not zero
};

// Tiles whole and cut in every dimension, one and two columns of them, sums kept between two depths of a
// panel (from k = 257, int8 513, on); and more rows than share one unpacking, with a single one left over.
constexpr int64_t kRowCounts[] = {16, 17, 31, 32, 33, 48};
constexpr int64_t kLayers[][2] = {{1, 1}, {16, 32}, {17, 33}, {33, 64}, {48, 127}, {47, 290}, {15, 576}};
constexpr int kPercents[] = {100, 50, 10, 90, 0};
constexpr Shape kTwoChunks = {513, 17, 33, 60};

int32_t make_weight(const Kernel& kernel, const Shape& shape, Random& random, Memory& memory) {
  for (int64_t i = 0; i < shape.n * shape.k; ++i) {
    const float drawn = random.number(), value = is_int8(kernel.kind) && drawn < 0 ? -drawn : drawn;
    memory.w[i] = static_cast<int>(random.bits() % 100) < shape.percent ? value : 0.0f;
  }
  Header head = {};
  head.kind = kernel.kind, head.n = shape.n, head.k = shape.k;
  return pack_weight(head, memory.w, memory.offsets, memory.scales, memory.packed, kMostPacked);
}

// One product: x and bias in both formats, by turns.
int32_t product(const Kernel& kernel, const Shape& shape, int turn, Memory& memory, Hash& hash) {
  Random random{static_cast<uint64_t>(turn) * 7919 + kernel.kind};
  if (const int32_t status = make_weight(kernel, shape, random, memory)) return status;
  hash.add(memory.packed, Packed(memory.packed).head.bytes);
  for (int64_t i = 0; i < shape.rows * shape.k; ++i)
    memory.x_half[i] = to_bf16(memory.x[i] = random.number());
  for (int64_t i = 0; i < shape.n; ++i) memory.bias_half[i] = to_bf16(memory.bias[i] = random.number());
  const bool whole = turn % 3 != 1;
  const void* biases[] = {memory.bias, memory.bias_half, nullptr};
  LinearCall call{memory.packed, memory.x, biases[turn % 3], memory.y, shape.rows, shape.k, whole,
                  turn % 3 == 0, 1};
  if (!whole) call.x = memory.x_half;
  const int32_t status = kernel.run(call);
  hash.add(memory.y, shape.rows * shape.n * (whole ? 4 : 2));
  return status;
}

int32_t products(const Kernel& kernel, Memory& memory, Hash& hash) {
  int turn = 0;
  for (const auto& [n, k] : kLayers)
    for (const int64_t rows : kRowCounts) {
      const Shape shape{rows, n, k, kPercents[turn % 5]};
      if (const int32_t status = product(kernel, shape, turn++, memory, hash)) return status;
    }
  return product(kernel, kTwoChunks, turn, memory, hash);
}

// For each kernel report(its name, the first bad status or kOk, hash of weights and outputs).
template <class Report>
void every_kernel(Memory& memory, Report report) {
  for (const Kernel& kernel : kKernels) {
    Hash hash;
    const int32_t status = products(kernel, memory, hash);
    report(kernel.name, status, hash.value);
  }
}

}  // namespace
