// Adapters: low-rank updates of what some steps write, chosen for each row, so that rows of several adapters and of none
// are one batch.
#pragma once
#include <cstdint>
#include <vector>

namespace engine {

constexpr int32_t kMostRank = 1024;  // a multiple of 16

// y += up^T (down x + bias). Of a linear step x is what it reads (LoRA), of another one what it writes, as y (interventions).
// Both matrices are bfloat16 [blocks of 16 outputs][pairs of inputs][16][2], sizes padded with zeros to multiples of 16.
struct LowRank {
  int32_t step, rank;
  const uint8_t* down;
  const float* bias;  // [rank, padded] or null
  const uint8_t* up;
};
static_assert(sizeof(LowRank) == 32, "engine_adapters.py writes it");

struct Adapter {
  std::vector<LowRank> updates;
  std::vector<int32_t> of_step;  // of each step: which of the updates, -1: none
};

// Neighbouring rows with one adapter, and some blocks of the columns of y.
struct LowRankCall {
  const LowRank* update;
  const float* x;
  float* y;
  int64_t x_stride, y_stride, rows, x_width, y_width;
  int64_t block, end;
};

}  // namespace engine

using EngineLowRank = engine::LowRankCall;
