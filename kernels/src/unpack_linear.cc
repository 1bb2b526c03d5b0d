// A packed weight back as float32 [n, k]: for gradients, and to look at.
#include <algorithm>

#include "int4.h"

struct UnpackCall {
  const uint8_t* packed;
  float* out;
  int32_t threads;
};

namespace {

// The vectors of a block, one after another, whatever the kind.
struct Reader {
  uint32_t kind;
  const uint8_t *masks, *at, *numbers = nullptr;
  int64_t left = 0, group = 0;

  Reader(const Packed& packed, int64_t block)
      : kind(packed.head.kind), masks(packed.stream(block)), at(masks) {
    if (kind != kBlockBf16) return;
    left = static_cast<int64_t>(wide(at));
    numbers = at + 64;
    at = numbers + ceil_to(2 * left, 64);
  }

  Vec next() {
    Vec w = expand2(0, at);
    const int64_t row = group++ % 16;
    if (kind == kBlockBf16) {
      uint16_t number = 0;
      if (left > 0) std::memcpy(&number, numbers, 2);
      if (left <= 0 || number != group - 1) return w;
      w = load(at);
      at += 64, numbers += 2, --left;
    } else if (kind == kSparseBf16 || kind == kSparseInt8) {
      const int mask_bytes = kind == kSparseBf16 ? 4 : 8;
      if (row == 0) masks = at, at += 16 * mask_bytes;
      const uint64_t mask = mask_bytes == 4 ? word(masks + 4 * row) : wide(masks + 8 * row);
      w = mask_bytes == 4 ? expand2(static_cast<uint32_t>(mask), at) : expand4(mask, at);
      at += __builtin_popcountll(mask) * (mask_bytes == 4 ? 2 : 1);
    } else {
      w = load(at);
      at += 64;
    }
    return w;
  }
};

void lanes(const Header& head, const uint8_t* vector, const float* scales, int64_t block, int64_t group,
           float* out) {
  const int per_lane = is_int8(head.kind) ? 4 : 2;
  const int64_t outputs = std::min<int64_t>(16, head.n - 16 * block), first = group * per_lane;
  const int64_t count = std::min<int64_t>(per_lane, head.k - first);
  for (int64_t output = 0; output < outputs; ++output)
    for (int64_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, vector + 4 * output + (per_lane == 2 ? 2 * i : 0), 2);
      out[(16 * block + output) * head.k + first + i] =
          per_lane == 2 ? from_bf16(bits) : static_cast<int8_t>(vector[4 * output + i]) * scales[output];
    }
}

void unpack_part(int part, int parts, void* context) {
  const UnpackCall& call = *static_cast<const UnpackCall*>(context);
  const Packed packed(call.packed);
  const Header& head = packed.head;
  for (int64_t block = head.blocks * part / parts; block < head.blocks * (part + 1) / parts; ++block) {
    if (head.kind == kDenseInt4) {
      for (int64_t row = 16 * block; row < std::min(head.n, 16 * block + 16); ++row)
        Int4::read_row(packed, row, call.out + row * head.k);
      continue;
    }
    Reader reader(packed, block);
    float scales[16] = {};
    if (is_int8(head.kind)) std::memcpy(scales, call.packed + head.scales_at + 64 * block, 64);
    for (int64_t group = 0; group < head.tiles * 16; ++group) {
      uint8_t vector[64];
      store(vector, reader.next());
      lanes(head, vector, scales, block, group, call.out);
    }
  }
}

}  // namespace

int32_t EFFC_AT_LEVEL(unpack_linear)(const UnpackCall& call) {
  effc_parallel(std::max(1, call.threads), unpack_part, const_cast<UnpackCall*>(&call));
  return kOk;
}

#if EFFC_LEVEL == 0
EFFC_TABLE(unpack_linear, UnpackCall)

EFFC_API int32_t effc_unpack_linear(int32_t level, const uint8_t* packed, int64_t bytes, int64_t n, int64_t k,
                                    float* out, int32_t threads) {
  uint32_t kind = 0;
  if (bytes >= static_cast<int64_t>(sizeof(Header))) kind = Packed(packed).head.kind;
  if (kind < kDenseBf16 || kind >= kKinds) return kKind;
  if (const int32_t status = effc_check(packed, bytes, kind, n, 0)) return status;
  const auto body = unpack_linear_at(level);
  if (!body || Packed(packed).head.k != k) return kArguments;
  return body(UnpackCall{packed, out, threads});
}
#endif
