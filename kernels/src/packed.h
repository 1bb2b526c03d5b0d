// The packed weight: one buffer, the same at every level. Little endian, all positions in bytes from its
// start.
//
// clang-format off
//   header            128 bytes
//   offsets           int64 [blocks + 1]      where a block of 16 outputs begins in the stream, and the
//                                             stream's end
//   scales            float32 [16 * blocks]   int8 kinds: weight = scale * code
//   sums              int32 [16 * blocks]     int8 kinds: 128 * the sum of an output's codes
//   stream            block after block, tile after tile
//   64 zero bytes     a vector load may begin at the last value
//
// A tile is 16 vectors of 64 bytes: lane = output, and in a lane the 2 (bfloat16) or 4 (int8) inputs of one
// group. It is the B operand of an AMX tile product, and each vector multiplies one broadcast group of
// activations.
//   dense    the 16 vectors
//   sparse   16 masks (uint32 or uint64, one bit per weight of a vector), then the weights that are not zero
//   block    int64 count, in 64 bytes; uint16 group numbers of the vectors that are not all zero, zeros to a
//            multiple of 64; those vectors
// int4 has a scale for each output and `group` inputs, and its tile is that group. A block is
//   scales   bfloat16 [tiles][16]             weight = scale * (code - zero), code and zero in 0..15
//   zeros    4 bits   [tiles][16]             outputs 0..7 in the low halves of 8 bytes, 8..15 in the high ones;
//                                             left out where all are 8; then zeros to a multiple of 64
//   codes    tile after tile, 64 bytes for 8 inputs: a vector of the first 4 in the low halves of bytes, and
//            one of the others in the high halves
// Blocks begin at multiples of 64 bytes.
// clang-format on
#pragma once
#include <cstdint>
#include <cstring>

#include "levels.h"

// Every linear kernel: its name, its kind, what numbers its weights are, and whether they lie in whole vectors, under
// masks, in blocks or by groups. A kind's number is its place here, from 1 on: stored buffers have it.
#define EFFC_LINEARS(each)                                    \
  each(dense_linear, kDenseBf16, kBf16, kWhole)               \
  each(sparse_linear, kSparseBf16, kBf16, kMasked)            \
  each(dense_linear_int8, kDenseInt8, kInt8, kWhole)          \
  each(sparse_linear_int8, kSparseInt8, kInt8, kMasked)       \
  each(block_sparse_linear, kBlockBf16, kBf16, kBlocks)       \
  each(dense_linear_int4, kDenseInt4, kInt4, kByGroup)        \
  each(dense_linear_int8_int16, kDenseInt8Int16, kInt8, kWhole)

#define EFFC_KIND(name, kind, numbers, lies) kind,
enum Kind : uint32_t { kNoKind, EFFC_LINEARS(EFFC_KIND) kKinds };
#undef EFFC_KIND
enum Numbers : uint8_t { kBf16, kInt8, kInt4 };
enum Lies : uint8_t { kWhole, kMasked, kBlocks, kByGroup };

struct Header {
  char magic[8];       // "effcpack"
  uint32_t order;      // 0x01020304 as this machine stores it
  uint32_t version;    // 1
  uint32_t kind;
  uint32_t group;      // int4: inputs that share a scale, and kZeros if zeros are stored; else 0
  int64_t n, k;        // outputs and inputs of the layer
  int64_t kept;        // weights (block: vectors) that are stored
  int64_t blocks;      // ceil(n / 16)
  int64_t tiles;       // tiles of a block: ceil(k / 32), int8: ceil(k / 64), int4: ceil(k / group)
  int64_t offsets_at, scales_at, sums_at, stream_at;
  int64_t bytes;       // of the whole buffer
  uint64_t hash;       // of the whole buffer, this field taken as zero
  char pad[16];
};
static_assert(sizeof(Header) == 128, "the header is part of the format");

constexpr uint32_t kByteOrder = 0x01020304, kFormat = 1;
constexpr int64_t kMost = int64_t(1) << 31;  // of outputs and of inputs
constexpr int64_t kTail = 64;
constexpr int64_t kMostInt8 = 66000;         // inputs: 255 * 127 * k stays within int32

namespace {

#define EFFC_NUMBERS(name, kind, numbers, lies) numbers,
#define EFFC_LIES(name, kind, numbers, lies) lies,
constexpr Numbers kNumbers[] = {kBf16, EFFC_LINEARS(EFFC_NUMBERS)};
constexpr Lies kLies[] = {kWhole, EFFC_LINEARS(EFFC_LIES)};
#undef EFFC_NUMBERS
#undef EFFC_LIES
constexpr bool is_int8(uint32_t kind) { return kind < kKinds && kNumbers[kind] == kInt8; }
constexpr bool lies(uint32_t kind, Lies so) { return kind < kKinds && kLies[kind] == so; }
constexpr int64_t ceil_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr uint32_t kZeros = 1u << 16;
constexpr int64_t group_of(const Header& head) { return head.group & (kZeros - 1); }
constexpr bool has_zeros(const Header& head) { return head.group & kZeros; }
// Where the codes of an int4 block begin, and what follows the block.
constexpr int64_t codes_at(const Header& head) {
  return ceil_to(head.tiles * (has_zeros(head) ? 40 : 32), 64);
}
constexpr int64_t int4_bytes(const Header& head) {
  return codes_at(head) + head.tiles * group_of(head) * 8;
}
constexpr int64_t block_bytes(int64_t count) { return 64 + ceil_to(2 * count, 64) + 64 * count; }

// Of a prepared row of x that meets one tile: 32 bfloat16, 64 codes or 64 codes of 16 bits, whose upper bytes are one
// line and whose lower ones another; int4: codes, a scale and their sum.
constexpr int64_t x_bytes(const Header& head) {
  if (head.kind == kDenseInt4) return group_of(head) + 8;
  return head.kind == kDenseInt8Int16 ? 128 : 64;
}

// The most that a prepared row takes for one tile, whichever way a level prepares it.
constexpr int64_t prepared_bytes(const Header& head) {
  return head.kind == kDenseInt4 ? 2 * group_of(head) : x_bytes(head);
}

// A checked buffer, opened for reading.
struct Packed {
  const uint8_t* at;
  Header head;

  explicit Packed(const uint8_t* buffer) : at(buffer) { std::memcpy(&head, buffer, sizeof head); }
  int64_t offset(int64_t block) const {
    int64_t found;
    std::memcpy(&found, at + head.offsets_at + 8 * block, 8);
    return found;
  }
  const uint8_t* stream(int64_t block) const { return at + head.stream_at + offset(block); }
};

}  // namespace

// The sections of a buffer, from kind, n and k; `stream_bytes` from packing. kSizes where it can't be.
int32_t effc_lay_out(Header& head, int64_t stream_bytes);
// Whether a buffer is a packed weight of this kind, for n outputs (any where negative); kOk or what is wrong.
EFFC_API int32_t effc_check(const uint8_t* buffer, int64_t bytes, uint32_t kind, int64_t n, int32_t deep);
uint64_t effc_seal(const uint8_t* buffer, int64_t bytes);  // the hash that belongs into its header
