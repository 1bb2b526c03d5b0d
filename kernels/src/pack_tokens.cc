// Blocks of 32 tokens of keys and values, appended to the stream of their head.
#include <algorithm>

#include "numbers.h"
#include "threads.h"

struct TokensCall {
  const uint16_t *keys, *values;  // bfloat16 [heads, tokens, d], `head_stride` elements between heads
  int64_t heads, d, head_stride;
  int64_t first, count;           // blocks that there are, and that are added
  uint8_t* stream;                // [heads, capacity]
  int64_t capacity;
  int64_t* offsets;               // [heads, offsets_stride]
  int64_t offsets_stride;
  int32_t sparse, threads;
  int32_t* status;
};

namespace {

// 16 lanes of 16 pairs as 16 vectors. Lane i, pair j: `pair(i, j)`.
template <class Pair>
uint8_t* put(const TokensCall& call, uint8_t* at, const uint8_t* end, Pair pair) {
  alignas(64) uint8_t tile[1024];
  for (int row = 0; row < 16; ++row)
    for (int lane = 0; lane < 16; ++lane) {
      const uint32_t both = pair(lane, row);
      std::memcpy(tile + 64 * row + 4 * lane, &both, 4);
    }
  if (end - at < 1088 + 64) return nullptr;
  if (!call.sparse) {
    std::memcpy(at, tile, 1024);
    return at + 1024;
  }
  uint8_t* values = at + 64;
  for (int row = 0; row < 16; ++row) {
    const Vec w = load(tile + 64 * row);
    const uint32_t mask = nonzero2(w);
    std::memcpy(at + 4 * row, &mask, 4);
    compress2(values, mask, w);
    values += 2 * __builtin_popcount(mask);
  }
  return values;
}

uint8_t* block(const TokensCall& call, const uint16_t* keys, const uint16_t* values, uint8_t* at,
               const uint8_t* end) {
  const int64_t d = call.d;
  for (int half = 0; half < 2 && at; ++half)
    for (int64_t tile = 0; tile < (d + 31) / 32 && at; ++tile)
      at = put(call, at, end, [&](int token, int pair) {
        const int64_t i = 32 * tile + 2 * pair;
        const uint16_t* key = keys + (16 * half + token) * d;
        const uint32_t low = i < d ? key[i] : 0, high = i + 1 < d ? key[i + 1] : 0;
        return high << 16 | low;
      });
  for (int64_t lane = 0; lane < (d + 15) / 16 && at; ++lane)
    at = put(call, at, end, [&](int dimension, int pair) {
      const int64_t i = 16 * lane + dimension;
      const uint32_t low = i < d ? values[2 * pair * d + i] : 0,
                     high = i < d ? values[(2 * pair + 1) * d + i] : 0;
      return high << 16 | low;
    });
  return at;
}

void tokens_part(int part, int parts, void* context) {
  const TokensCall& call = *static_cast<const TokensCall*>(context);
  for (int64_t head = call.heads * part / parts; head < call.heads * (part + 1) / parts; ++head) {
    int64_t* offsets = call.offsets + head * call.offsets_stride;
    uint8_t* base = call.stream + head * call.capacity;
    for (int64_t i = 0; i < call.count; ++i) {
      const int64_t from = offsets[call.first + i], at = head * call.head_stride + 32 * i * call.d;
      uint8_t* end = nullptr;
      if (from >= 0 && from <= call.capacity)
        end = block(call, call.keys + at, call.values + at, base + from, base + call.capacity);
      if (!end) {
        call.status[part] = kCut;
        return;
      }
      offsets[call.first + i + 1] = end - base;
    }
  }
}

}  // namespace

int32_t EFFC_AT_LEVEL(pack_tokens)(const TokensCall& call) {
  const int parts = std::max(1, std::min(call.threads, 64));
  effc_parallel(parts, tokens_part, const_cast<TokensCall*>(&call));
  return *std::max_element(call.status, call.status + parts);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(pack_tokens, TokensCall)

EFFC_API int32_t effc_pack_tokens(int32_t level, const uint16_t* keys, const uint16_t* values, int64_t heads,
                                  int64_t d, int64_t head_stride, int64_t first, int64_t count,
                                  uint8_t* stream, int64_t capacity, int64_t* offsets, int64_t offsets_stride,
                                  int32_t sparse, int32_t threads) {
  const auto body = pack_tokens_at(level);
  if (!body || first < 0 || count < 0 || first + count >= offsets_stride) return kArguments;
  int32_t status[64] = {};
  return body(TokensCall{keys, values, heads, d, head_stride, first, count, stream, capacity, offsets,
                         offsets_stride, sparse, threads, status});
}
#endif
