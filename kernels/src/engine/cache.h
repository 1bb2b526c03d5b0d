// Keys and values of all sequences, where attention reads them and new tokens are written: in place.
//
// A head of a slot is a row of blocks of 32 tokens, each as `attention.h` has them: keys as two times 16
// tokens by all dimensions, values as all dimensions, 16 at a time, by 32 tokens, bfloat16; or as `int8_block.h` has
// them. Room for the whole context is reserved and costs memory only where tokens are. Behind a sequence's length all is
// zero; of int8, the scales.
#pragma once
#include <vector>

#include "plan.h"

namespace engine {

constexpr int64_t kBlockTokens = 32;

class Cache {
 public:
  Cache() = default;
  ~Cache();
  Cache(const Cache&) = delete;
  bool reserve(const Plan& plan);  // false: no room
  // The blocks of the first head of a slot; the other heads follow, `head_bytes(slot)` apart.
  uint8_t* slot(int64_t sequence, int32_t slot) const;
  int64_t head_bytes(int32_t slot) const { return shapes_[slot].head; }
  int64_t block_bytes(int32_t slot) const { return shapes_[slot].block; }
  void forget(int64_t sequence, int64_t length);
  int64_t length(int64_t sequence) const { return lengths_[sequence]; }
  void extend(int64_t sequence, int64_t tokens) { lengths_[sequence] += tokens; }
  int64_t sequences() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t context() const { return context_; }

 private:
  struct Shape {
    int64_t at, head, block, keys;  // bytes: of the slot in a sequence, of a head, of a block, of its keys
    int32_t heads, key_tiles, value_lanes, numbers;
  };
  void clear(uint8_t* head, const Shape& shape, int64_t from, int64_t until) const;

  std::vector<Shape> shapes_;
  std::vector<int64_t> lengths_;
  int64_t context_ = 0, sequence_bytes_ = 0, bytes_ = 0;
  uint8_t* memory_ = nullptr;
};

}  // namespace engine
