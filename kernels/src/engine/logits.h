// What choosing a token does to all logits, in vectors: `logits.cc` has it at every level.
#pragma once
#include <cstdint>

#include "../levels.h"

// Logits in groups of 256, of which each lane's 16 lie 16 apart.
constexpr int64_t kGroup = 256;

struct LogitsCall {
  const float* logits;
  int64_t count;
  float* most;          // [groups][16]: the largest of each lane of a group
  float* weights;       // [groups][256]: exp((logit - largest) / temperature), 0 where that is below e^-80
  double* sums;         // [groups]: of weights
  float largest, temperature;
};
