// Weights into the packed form, in two passes: `measure` finds scales and how long each block becomes, then
// `fill` writes into a buffer of exactly that size. Both go tile by tile; equal weights give equal bytes.
#include <algorithm>

#include "numbers.h"
#include "threads.h"

struct PackCall {
  const void* w;          // [n, k], last dimension contiguous, `stride` elements between outputs
  int64_t stride;
  int32_t w_float;        // float32, else bfloat16
  int32_t threads;
  Header* head;           // kind, n and k set; measure adds kept and bytes
  int64_t* offsets;       // [blocks + 1]
  float* scales;          // [16 * blocks], int8 kinds
  uint8_t* buffer;        // fill: zeroed, head->bytes long
};

namespace {

// The weights of one tile as it stands in a dense stream. Outputs and inputs past the end are zeros.
struct Tile {
  alignas(64) uint8_t bytes[1024];
  const uint8_t* row(int i) const { return bytes + 64 * i; }
};

struct Source {
  const PackCall& call;
  const Header& head;
  int64_t block, outputs;
  explicit Source(const PackCall& call, int64_t block)
      : call(call), head(*call.head), block(block), outputs(std::min<int64_t>(16, head.n - 16 * block)) {}

  int64_t at(int64_t output) const { return (16 * block + output) * call.stride; }

  // Inputs from..from+count of an output as the 64 bytes of its lane in 16 vectors.
  void lane(int64_t output, int64_t from, int64_t count, float inverse, uint8_t* into) const {
    const int64_t first = at(output) + from;
    if (is_int8(head.kind)) {
      codes(call.w, call.w_float, first, count, inverse, 0, into);
    } else if (call.w_float) {
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t value = to_bf16(static_cast<const float*>(call.w)[first + i]);
        std::memcpy(into + 2 * i, &value, 2);
      }
    } else {
      std::memcpy(into, static_cast<const uint16_t*>(call.w) + first, 2 * count);
    }
  }

  void read(int64_t tile, Tile& out) const {
    const int64_t per_tile = is_int8(head.kind) ? 64 : 32, from = tile * per_tile;
    const int64_t count = std::min(per_tile, head.k - from);
    alignas(64) uint8_t lanes[16][64];
    for (int64_t output = 0; output < 16; ++output) {
      if (output >= outputs || count < per_tile) std::memset(lanes[output], 0, 64);
      if (output >= outputs) continue;
      const float scale = is_int8(head.kind) ? call.scales[16 * block + output] : 1.0f;
      lane(output, from, count, scale > 0 ? 1.0f / scale : 0.0f, lanes[output]);
    }
    for (int row = 0; row < 16; ++row)
      for (int output = 0; output < 16; ++output)
        std::memcpy(out.bytes + 64 * row + 4 * output, lanes[output] + 4 * row, 4);
  }
};

bool finite(const Tile& tile) {
  bool all = true;
  for (int i = 0; i < 512; ++i) {
    uint16_t value;
    std::memcpy(&value, tile.bytes + 2 * i, 2);
    all &= (value & 0x7f80) != 0x7f80;
  }
  return all;
}

int64_t ones(uint32_t kind, const Tile& tile) {
  int64_t count = 0;
  for (int row = 0; row < 16; ++row) {
    const Vec w = load(tile.row(row));
    if (kind == kSparseBf16) count += __builtin_popcount(nonzero2(w));
    if (kind == kSparseInt8) count += __builtin_popcountll(nonzero4(w));
    if (kind == kBlockBf16) count += nonzero2(w) != 0;
  }
  return count;
}

int64_t length(const Header& head, int64_t kept) {
  switch (head.kind) {
    case kSparseBf16:
      return ceil_to(64 * head.tiles + 2 * kept, 64);
    case kSparseInt8:
      return ceil_to(128 * head.tiles + kept, 64);
    case kBlockBf16:
      return block_bytes(kept);
    default:
      return 1024 * head.tiles;
  }
}

struct Measured {
  const PackCall& call;
  int64_t* kept;   // [parts]
  int32_t* status; // [parts]
};

bool find_scales(const Source& source) {
  const PackCall& call = source.call;
  bool all_finite = true;
  for (int64_t output = 0; output < 16; ++output) {
    const bool real = output < source.outputs;
    const float most = real ? largest(call.w, call.w_float, source.at(output), source.head.k) : 0.0f;
    all_finite &= most - most == 0;
    call.scales[16 * source.block + output] = most > kLeast ? most / 127.0f : 0.0f;
  }
  return all_finite;
}

void measure_part(int part, int parts, void* context) {
  const Measured& job = *static_cast<const Measured*>(context);
  const Header& head = *job.call.head;
  for (int64_t block = head.blocks * part / parts; block < head.blocks * (part + 1) / parts; ++block) {
    const Source source(job.call, block);
    if (is_int8(head.kind) && !find_scales(source)) {
      job.status[part] = kNotFinite;
      return;
    }
    int64_t kept = 0;
    Tile tile;
    for (int64_t i = 0; i < head.tiles; ++i) {
      source.read(i, tile);
      if (!is_int8(head.kind) && !finite(tile)) job.status[part] = kNotFinite;
      kept += ones(head.kind, tile);
    }
    job.kept[part] += kept;
    job.call.offsets[block + 1] = length(head, kept);
  }
}

// A vector's mask and values; `values` moves past what was written. Vectors are written whole, so the last
// ones of a tile go through memory of our own: what follows may be another thread's.
void put_sparse(uint32_t kind, const Tile& tile, uint8_t*& at) {
  const int width = kind == kSparseBf16 ? 2 : 1, mask_bytes = kind == kSparseBf16 ? 4 : 8;
  uint8_t values[1024 + 64];
  uint8_t* end = values;
  for (int row = 0; row < 16; ++row) {
    const Vec w = load(tile.row(row));
    const uint64_t mask = kind == kSparseBf16 ? nonzero2(w) : nonzero4(w);
    if (kind == kSparseBf16)
      compress2(end, static_cast<uint32_t>(mask), w);
    else
      compress4(end, mask, w);
    end += width * __builtin_popcountll(mask);
    std::memcpy(at + mask_bytes * row, &mask, mask_bytes);
  }
  std::memcpy(at + 16 * mask_bytes, values, end - values);
  at += 16 * mask_bytes + (end - values);
}

void put_blocks(const Tile& tile, int64_t index, int64_t& kept, uint8_t* vectors, uint8_t* numbers) {
  for (int row = 0; row < 16; ++row) {
    if (nonzero2(load(tile.row(row))) == 0) continue;
    const auto number = static_cast<uint16_t>(16 * index + row);
    std::memcpy(vectors + 64 * kept, tile.row(row), 64);
    std::memcpy(numbers + 2 * kept, &number, 2);
    ++kept;
  }
}

void add_codes(const Tile& tile, int32_t* sums) {
  for (int i = 0; i < 1024; ++i) sums[i / 4 % 16] += 128 * static_cast<int8_t>(tile.bytes[i]);
}

void fill_part(int part, int parts, void* context) {
  const PackCall& call = *static_cast<const PackCall*>(context);
  const Header& head = *call.head;
  for (int64_t block = head.blocks * part / parts; block < head.blocks * (part + 1) / parts; ++block) {
    const Source source(call, block);
    const int64_t bytes = call.offsets[block + 1] - call.offsets[block];
    uint8_t* const start = call.buffer + head.stream_at + call.offsets[block];
    uint8_t* at = start;
    int64_t kept = 0;
    // `block_bytes` undone: of all lines but the first, one in 33 holds numbers.
    const int64_t lines = bytes / 64 - 1, vectors = lines - (lines + 32) / 33;
    int32_t sums[16] = {};
    Tile tile;
    for (int64_t i = 0; i < head.tiles; ++i) {
      source.read(i, tile);
      if (is_int8(head.kind)) add_codes(tile, sums);
      if (head.kind == kBlockBf16) {
        put_blocks(tile, i, kept, start + 64 + ceil_to(2 * vectors, 64), start + 64);
      } else if (head.kind == kSparseBf16 || head.kind == kSparseInt8) {
        put_sparse(head.kind, tile, at);
      } else {
        std::memcpy(at, tile.bytes, 1024);
        at += 1024;
      }
    }
    if (head.kind == kBlockBf16) std::memcpy(start, &kept, 8);
    if (is_int8(head.kind)) std::memcpy(call.buffer + head.sums_at + 64 * block, sums, 64);
  }
}

int32_t measure(const PackCall& call) {
  Header& head = *call.head;
  constexpr int kMostParts = 64;
  const int parts = std::max(1, std::min(call.threads, kMostParts));
  int64_t kept[kMostParts] = {};
  int32_t status[kMostParts] = {};
  Measured job{call, kept, status};
  effc_parallel(parts, measure_part, &job);
  for (int part = 0; part < parts; ++part) {
    if (status[part] != kOk) return status[part];
    head.kept += kept[part];
  }
  call.offsets[0] = 0;
  for (int64_t block = 0; block < head.blocks; ++block) call.offsets[block + 1] += call.offsets[block];
  return effc_lay_out(head, call.offsets[head.blocks]);
}

int32_t fill(const PackCall& call) {
  const Header& head = *call.head;
  std::memcpy(call.buffer + head.offsets_at, call.offsets, 8 * (head.blocks + 1));
  if (is_int8(head.kind)) std::memcpy(call.buffer + head.scales_at, call.scales, 64 * head.blocks);
  effc_parallel(std::max(1, call.threads), fill_part, const_cast<PackCall*>(&call));
  std::memcpy(call.buffer, &head, sizeof head);
  return kOk;
}

}  // namespace

int32_t EFFC_AT_LEVEL(pack)(const PackCall& call) { return call.buffer ? fill(call) : measure(call); }

#if EFFC_LEVEL == 0
EFFC_TABLE(pack, PackCall)

// Sizes of the sections for `kind` in head: blocks and tiles, before there are offsets and scales to hold.
EFFC_API int32_t effc_pack_begin(Header* head) {
  std::memcpy(head->magic, "effcpack", 8);
  head->order = kByteOrder;
  head->version = kFormat;
  head->kept = 0;
  return effc_lay_out(*head, 0);
}

// With `buffer` null: measures. Else fills it and seals it.
EFFC_API int32_t effc_pack(int32_t level, Header* head, const void* w, int64_t stride, int32_t w_float,
                           int64_t* offsets, float* scales, uint8_t* buffer, int32_t threads) {
  const auto body = pack_at(level);
  if (!body) return kArguments;
  if (head->kind == kDenseInt4) return kKind;  // its codes are chosen before: `pack_end` closes such a buffer
  const int32_t status = body(PackCall{w, stride, w_float, threads, head, offsets, scales, buffer});
  if (status != kOk || !buffer) return status;
  head->hash = effc_seal(buffer, head->bytes);
  std::memcpy(buffer, head, sizeof *head);
  return kOk;
}
#endif
