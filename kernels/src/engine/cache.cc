#include "cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "int8_block.h"

namespace engine {
namespace {

constexpr int64_t kTile = 1024;
constexpr double kMostBytes = 1e14;  // no processor addresses as much

}  // namespace

Cache::~Cache() {
  if (memory_) munmap(memory_, static_cast<size_t>(bytes_));
}

bool Cache::reserve(const Plan& plan) {
  const int64_t page = sysconf(_SC_PAGESIZE), blocks = ceil_to(plan.context, kBlockTokens) / kBlockTokens;
  context_ = plan.context;
  lengths_.assign(plan.sequences, 0);
  for (int32_t i = 0; i < plan.slot_count; ++i) {
    const Slot& slot = plan.slots[i];
    Shape shape{sequence_bytes_,    0, 0, 0, slot.kv_heads, (slot.head_dim + 31) / 32,
                (slot.value_dim + 15) / 16, slot.numbers};
    shape.keys = 2 * shape.key_tiles * kTile;
    shape.block = shape.keys + shape.value_lanes * kTile;
    if (slot.numbers == kKvInt8) shape.block = Int8Block(slot.head_dim, slot.value_dim).bytes();
    const double heads = double(shape.heads) * plan.slot_count * plan.sequences;
    if (heads * shape.block * (blocks + 1) > kMostBytes) return false;
    shape.head = ceil_to(blocks * shape.block, page);
    sequence_bytes_ += shape.heads * shape.head;
    shapes_.push_back(shape);
  }
  bytes_ = std::max<int64_t>(page, sequence_bytes_ * plan.sequences);
  void* found = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  memory_ = found == MAP_FAILED ? nullptr : static_cast<uint8_t*>(found);
  return memory_ != nullptr;
}

uint8_t* Cache::slot(int64_t sequence, int32_t slot) const {
  return memory_ + sequence * sequence_bytes_ + shapes_[slot].at;
}

void Cache::forget(int64_t sequence, int64_t length) {
  const int64_t until = lengths_[sequence];
  for (size_t i = 0; i < shapes_.size() && length < until; ++i)
    for (int32_t head = 0; head < shapes_[i].heads; ++head)
      clear(slot(sequence, static_cast<int32_t>(i)) + head * shapes_[i].head, shapes_[i], length, until);
  lengths_[sequence] = std::min(length, until);
}

// Zeros for tokens from..until-1 of a head. Whole pages go back to the system.
void Cache::clear(uint8_t* head, const Shape& shape, int64_t from, int64_t until) const {
  const int64_t first = ceil_to(from, kBlockTokens);
  uint8_t* block = head + from / kBlockTokens * shape.block;
  for (int64_t token = from; token < std::min(first, until); ++token) {
    const int64_t own = token % kBlockTokens;
    if (shape.numbers == kKvInt8) {  // the scales: a group of keys is as wide as a tile
      for (int64_t group = 0; group <= shape.key_tiles; ++group) std::memset(block + 64 * group + 2 * own, 0, 2);
      continue;
    }
    uint8_t* keys = block + own / 16 * shape.key_tiles * kTile + own % 16 * 4;
    for (int64_t pair = 0; pair < 16 * shape.key_tiles; ++pair) std::memset(keys + 64 * pair, 0, 4);
    uint8_t* values = block + shape.keys + own / 2 * 64 + own % 2 * 2;
    for (int64_t i = 0; i < 16 * shape.value_lanes; ++i)
      std::memset(values + i / 16 * kTile + i % 16 * 4, 0, 2);
  }
  if (first >= until) return;
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t start = first / kBlockTokens * shape.block;
  const int64_t end = ceil_to(until, kBlockTokens) / kBlockTokens * shape.block;
  // The room of a head ends with a page, and nothing of it is used behind `end`.
  const int64_t whole = std::min(ceil_to(start, page), end), last = std::max(whole, ceil_to(end, page));
  std::memset(head + start, 0, static_cast<size_t>(whole - start));
  if (last > whole && madvise(head + whole, static_cast<size_t>(last - whole), MADV_DONTNEED) != 0)
    std::memset(head + whole, 0, static_cast<size_t>(end - whole));
}

}  // namespace engine
