// What a packed buffer must hold before a kernel reads it. A kernel trusts offsets and masks, so every one is
// looked at here: whatever the bytes are, no kernel leaves the buffer.
#include "packed.h"

#include <cstddef>

namespace {

template <class T>
T read(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <class Mask>
int64_t ones(const uint8_t* masks) {
  int64_t count = 0;
  for (int row = 0; row < 16; ++row) count += __builtin_popcountll(read<Mask>(masks + row * sizeof(Mask)));
  return count;
}

// A block of a sparse kind: its masks must lie inside it, and their bits must say exactly how long it is.
template <class Mask>
int32_t check_sparse(const uint8_t* at, int64_t bytes, int64_t tiles, int64_t& kept) {
  constexpr int64_t kMasks = 16 * sizeof(Mask), kWidth = sizeof(Mask) == 4 ? 2 : 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (bytes < kMasks) return kCounts;
    const int64_t count = ones<Mask>(at), length = kMasks + kWidth * count;
    if (bytes < length) return kCounts;
    kept += count;
    at += length;
    bytes -= length;
  }
  return bytes < 64 ? kOk : kCounts;  // blocks begin at multiples of 64
}

int32_t check_block(const uint8_t* at, int64_t bytes, int64_t groups, int64_t& kept) {
  if (bytes < 64) return kCounts;
  const int64_t count = read<int64_t>(at);
  if (count < 0 || count > groups || block_bytes(count) != bytes) return kCounts;
  const uint8_t* numbers = at + 64;
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t group = read<uint16_t>(numbers + 2 * i);
    if (group <= last || group >= groups) return kCounts;
    last = group;
  }
  kept += count;
  return kOk;
}

int32_t check_stream(const Packed& packed) {
  const Header& head = packed.head;
  const int64_t end = head.bytes - kTail - head.stream_at;
  if (packed.offset(0) != 0 || packed.offset(head.blocks) != end) return kOffsets;
  int64_t kept = 0;
  for (int64_t block = 0; block < head.blocks; ++block) {
    const int64_t from = packed.offset(block), to = packed.offset(block + 1);
    if (from < 0 || to < from || to > end || from % 64) return kOffsets;
    const uint8_t* at = packed.at + head.stream_at + from;
    int32_t status = kOk;
    switch (kLies[head.kind]) {
      case kWhole:
        status = to - from == head.tiles * 1024 ? kOk : kOffsets;
        break;
      case kByGroup:
        status = to - from == int4_bytes(head) ? kOk : kOffsets;
        break;
      case kMasked:
        status = is_int8(head.kind) ? check_sparse<uint64_t>(at, to - from, head.tiles, kept)
                                    : check_sparse<uint32_t>(at, to - from, head.tiles, kept);
        break;
      case kBlocks:
        status = check_block(at, to - from, head.tiles * 16, kept);
        break;
    }
    if (status != kOk) return status;
  }
  const bool dense = lies(head.kind, kWhole) || lies(head.kind, kByGroup);
  return dense || kept == head.kept ? kOk : kCounts;
}

// Eight lanes of multiply and rotate over 64-bit words: as fast as memory, and any changed bit changes it.
uint64_t hash(const uint8_t* data, int64_t bytes) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15ull;
  uint64_t lane[8];
  for (int i = 0; i < 8; ++i) lane[i] = kOdd * (i + 1);
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64)
    for (int i = 0; i < 8; ++i) {
      const uint64_t mixed = (lane[i] ^ read<uint64_t>(data + at + 8 * i)) * kOdd;
      lane[i] = mixed ^ (mixed >> 29);
    }
  uint64_t all = static_cast<uint64_t>(bytes);
  for (; at < bytes; ++at) all = (all ^ data[at]) * kOdd;
  for (int i = 0; i < 8; ++i) {
    all = (all ^ lane[i]) * kOdd;
    all ^= all >> 31;
  }
  return all;
}

}  // namespace

int32_t effc_lay_out(Header& head, int64_t stream_bytes) {
  if (head.n < 1 || head.k < 1 || head.n >= kMost || head.k >= kMost) return kSizes;
  if (is_int8(head.kind) && head.k > kMostInt8) return kTooLong;
  const int64_t group = group_of(head);
  if (head.kind != kDenseInt4 && head.group) return kSizes;
  if (head.kind == kDenseInt4 && ((head.group & ~(kZeros | 224)) || (group != 32 && group != 64 && group != 128)))
    return kSizes;
  const int64_t per_tile = head.kind == kDenseInt4 ? group : is_int8(head.kind) ? 64 : 32;
  head.blocks = (head.n + 15) / 16;
  head.tiles = (head.k + per_tile - 1) / per_tile;
  if (head.kind == kBlockBf16 && head.tiles * 16 > 65536) return kTooLong;
  const int64_t lanes = is_int8(head.kind) ? 16 * head.blocks * 4 : 0;
  head.offsets_at = sizeof(Header);
  head.scales_at = head.offsets_at + 8 * (head.blocks + 1);
  head.sums_at = head.scales_at + lanes;
  head.stream_at = ceil_to(head.sums_at + lanes, 64);
  if (stream_bytes < 0 || stream_bytes > (int64_t(1) << 60)) return kSizes;
  head.bytes = head.stream_at + stream_bytes + kTail;
  return kOk;
}

uint64_t effc_seal(const uint8_t* buffer, int64_t bytes) {
  Header head = Packed(buffer).head;
  head.hash = 0;
  const uint64_t front = hash(reinterpret_cast<const uint8_t*>(&head), sizeof head);
  return front * 31 + hash(buffer + sizeof head, bytes - sizeof head);
}

// Whether `buffer` is a packed weight of this kind and size. `deep` also reads the stream and its hash.
EFFC_API int32_t effc_check(const uint8_t* buffer, int64_t bytes, uint32_t kind, int64_t n, int32_t deep) {
  if (bytes < static_cast<int64_t>(sizeof(Header))) return kShort;
  const Packed packed(buffer);
  const Header& head = packed.head;
  if (std::memcmp(head.magic, "effcpack", 8) != 0) return kMagic;
  if (head.order != kByteOrder) return kOrder;
  if (head.version != kFormat) return kVersion;
  if (head.kind != kind || kind == kNoKind || kind >= kKinds) return kKind;
  if (head.bytes != bytes) return kCut;
  Header expected = head;
  if (const int32_t status = effc_lay_out(expected, 0)) return status;
  if (n >= 0 && head.n != n) return kSizes;
  if (head.blocks != expected.blocks || head.tiles != expected.tiles ||
      head.offsets_at != expected.offsets_at || head.scales_at != expected.scales_at ||
      head.sums_at != expected.sums_at || head.stream_at != expected.stream_at)
    return kSections;
  if (head.bytes < expected.bytes) return kCut;
  if (!deep) return kOk;
  if (effc_seal(buffer, bytes) != head.hash) return kHash;
  return check_stream(packed);
}

// The checksum into a buffer that a caller filled, after a look at all of it.
EFFC_API int32_t effc_pack_end(uint8_t* buffer, int64_t bytes, uint32_t kind) {
  if (const int32_t status = effc_check(buffer, bytes, kind, -1, 0)) return status;
  const uint64_t hash = effc_seal(buffer, bytes);
  std::memcpy(buffer + offsetof(Header, hash), &hash, sizeof hash);
  return effc_check(buffer, bytes, kind, -1, 1);
}

// Writes the right checksum into a buffer, whatever it holds: tests reach what lies behind the checksum with
// it.
EFFC_API void effc_seal_for_tests(uint8_t* buffer, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(Header))) return;
  const uint64_t hash = effc_seal(buffer, bytes);
  std::memcpy(buffer + offsetof(Header, hash), &hash, sizeof hash);
}
