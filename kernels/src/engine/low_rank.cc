// Low-rank updates of rows, at the level of this compilation. A row's sums don't depend on the rows beside it.
#include <algorithm>

#include "../levels.h"
#include "../vec.h"
#include "adapters.h"

namespace {

using engine::LowRank;
using engine::LowRankCall;

constexpr int64_t kLane = 16, kRowsAtOnce = 4, kRanksAtOnce = 4;

// 16 numbers, those behind the end taken as zero.
Floats load_up_to(const float* from, int64_t count) {
  if (count >= kLane) return load_floats(from);
  float padded[kLane] = {};
  std::copy(from, from + count, padded);
  return load_floats(padded);
}

template <int Rows, int Ranks>
void project(const LowRankCall& call, const float* x, int64_t rank, float (*sums)[engine::kMostRank]) {
  const LowRank& update = *call.update;
  const int64_t padded = (call.x_width + kLane - 1) / kLane * kLane;
  const uint16_t* down = update.down + rank * padded;
  Floats totals[Rows][Ranks];
  for (auto& row : totals)
    for (Floats& sum : row) sum = no_floats();
  for (int64_t i = 0; i < call.x_width; i += kLane) {
    Floats factors[Ranks];
    for (int j = 0; j < Ranks; ++j) factors[j] = load_halves(down + j * padded + i);
    for (int r = 0; r < Rows; ++r) {
      const Floats values = load_up_to(x + r * call.x_stride + i, call.x_width - i);
      for (int j = 0; j < Ranks; ++j) totals[r][j] = plus(totals[r][j], times(values, factors[j]));
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Ranks; ++j)
      sums[r][rank + j] = total(totals[r][j]) + (update.bias ? update.bias[rank + j] : 0.0f);
}

template <int Rows>
void add_block(const LowRankCall& call, int64_t block, const float (*sums)[engine::kMostRank], float* y) {
  const int64_t rank = call.update->rank, first = block * kLane, count = call.y_width - first;
  const uint16_t* up = call.update->up + block * rank * kLane;
  Floats values[Rows];
  for (int r = 0; r < Rows; ++r) values[r] = load_up_to(y + r * call.y_stride + first, count);
  for (int64_t j = 0; j < rank; ++j, up += kLane) {
    const Floats factors = load_halves(up);
    for (int r = 0; r < Rows; ++r) values[r] = plus(values[r], times(all(sums[r][j]), factors));
  }
  for (int r = 0; r < Rows; ++r) {
    float stored[kLane];
    float* to = y + r * call.y_stride + first;
    store(count < kLane ? stored : to, values[r]);
    if (count < kLane) std::copy(stored, stored + count, to);
  }
}

template <int Rows>
void update_rows(const LowRankCall& call, int64_t row) {
  float sums[Rows][engine::kMostRank];
  const float* x = call.x + row * call.x_stride;
  const int64_t ranks = call.update->rank, whole = ranks / kRanksAtOnce * kRanksAtOnce;
  for (int64_t rank = 0; rank < whole; rank += kRanksAtOnce) project<Rows, kRanksAtOnce>(call, x, rank, sums);
  for (int64_t rank = whole; rank < ranks; ++rank) project<Rows, 1>(call, x, rank, sums);
  for (int64_t block = call.block; block < call.end; ++block) add_block<Rows>(call, block, sums, call.y + row * call.y_stride);
}

}  // namespace

int32_t EFFC_AT_LEVEL(engine_low_rank)(const EngineLowRank& call) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= call.rows; row += kRowsAtOnce) update_rows<kRowsAtOnce>(call, row);
  for (; row < call.rows; ++row) update_rows<1>(call, row);
  return kOk;
}
