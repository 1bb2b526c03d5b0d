// How 32 tokens of a head lie in a cache of int8.
//
// The scales of keys, bfloat16, [groups of 32 numbers][32 tokens]; those of values [32 tokens]; keys as two times
// [4 numbers of each of 16 tokens], values [16 numbers][4 tokens of each].
#pragma once
#include <cstdint>

namespace engine {
namespace {

constexpr int64_t kScaleGroup = 32;  // numbers of a key that share a scale; a value has one

struct Int8Block {
  int64_t groups, lanes;  // of a key, of a value: 16 numbers
  Int8Block(int64_t head_dim, int64_t value_dim)
      : groups((head_dim + kScaleGroup - 1) / kScaleGroup), lanes((value_dim + 15) / 16) {}
  int64_t value_scales() const { return 64 * groups; }
  int64_t keys() const { return 64 * (groups + 1); }
  int64_t half() const { return 512 * groups; }  // keys of 16 tokens
  int64_t values() const { return keys() + 2 * half(); }
  int64_t bytes() const { return values() + 512 * lanes; }
};

}  // namespace
}  // namespace engine
