// Low-rank updates of rows, at the level of this compilation. A row's sums don't depend on the rows beside it.
#include <algorithm>

#include "../levels.h"
#include "../vec.h"
#include "adapters.h"

namespace {

using engine::kMostRank;
using engine::LowRankCall;

constexpr int64_t kLane = 16, kRowsAtOnce = 8, kChunk = 1024;  // inputs that are rounded at once
constexpr int64_t kLine = 64;                                  // bytes: 16 outputs of two inputs

// 16 numbers, those behind the end taken as zero.
Floats load_up_to(const float* from, int64_t count) {
  if (count >= kLane) return load_floats(from);
  float padded[kLane] = {};
  if (count > 0) std::copy(from, from + count, padded);
  return load_floats(padded);
}

// Adds products of pairs of rounded inputs and lines of 16 outputs to the sums of each row. `pairs` is even.
template <int Rows>
void add_products(const uint8_t* lines, int64_t pairs, const uint32_t* const (&inputs)[Rows], Floats (&sums)[Rows]) {
  Floats odd[Rows];
  for (Floats& sum : odd) sum = no_floats();
  for (int64_t p = 0; p < pairs; p += 2) {
    const Vec even_line = load(lines + p * kLine), odd_line = load(lines + (p + 1) * kLine);
    for (int r = 0; r < Rows; ++r) {
      dot2(sums[r], even_line, inputs[r][p]);
      dot2(odd[r], odd_line, inputs[r][p + 1]);
    }
  }
  for (int r = 0; r < Rows; ++r) sums[r] = plus(sums[r], odd[r]);
}

// `count` numbers to bfloat16, and zeros up to a multiple of 16.
void round_to(uint32_t* to, const float* from, int64_t count) {
  auto* halves = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; i += kLane) store_halves(halves + i, load_up_to(from + i, count - i));
}

template <int Rows>
void update_rows(const LowRankCall& call, int64_t row) {
  float sums[Rows][kMostRank];
  uint32_t rounded[Rows][kChunk / 2];  // inputs, then the sums of ranks
  const uint32_t* inputs[Rows];
  for (int r = 0; r < Rows; ++r) inputs[r] = rounded[r];
  const auto& update = *call.update;
  const int64_t ranks = (update.rank + kLane - 1) / kLane, pairs = (call.x_width + kLane - 1) / kLane * kLane / 2;
  for (auto& row_sums : sums)
    for (int64_t j = 0; j < ranks * kLane; ++j) row_sums[j] = update.bias ? update.bias[j] : 0.0f;
  for (int64_t first = 0; first < call.x_width; first += kChunk) {
    const int64_t count = std::min(kChunk, call.x_width - first);
    for (int r = 0; r < Rows; ++r) round_to(rounded[r], call.x + (row + r) * call.x_stride + first, count);
    for (int64_t block = 0; block < ranks; ++block) {
      Floats totals[Rows];
      for (int r = 0; r < Rows; ++r) totals[r] = load_floats(sums[r] + block * kLane);
      const int64_t used = (count + kLane - 1) / kLane * kLane / 2;
      add_products<Rows>(update.down + (block * pairs + first / 2) * kLine, used, inputs, totals);
      for (int r = 0; r < Rows; ++r) store(sums[r] + block * kLane, totals[r]);
    }
  }
  for (int r = 0; r < Rows; ++r) round_to(rounded[r], sums[r], ranks * kLane);
  for (int64_t block = call.block; block < call.end; ++block) {
    const int64_t first = block * kLane, count = std::min(kLane, call.y_width - first);
    Floats values[Rows];
    for (int r = 0; r < Rows; ++r) values[r] = load_up_to(call.y + (row + r) * call.y_stride + first, count);
    add_products<Rows>(update.up + block * ranks * kLane / 2 * kLine, ranks * kLane / 2, inputs, values);
    for (int r = 0; r < Rows; ++r) {
      float stored[kLane];
      store(stored, values[r]);
      std::copy(stored, stored + count, call.y + (row + r) * call.y_stride + first);
    }
  }
}

}  // namespace

int32_t EFFC_AT_LEVEL(engine_low_rank)(const EngineLowRank& call) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= call.rows; row += kRowsAtOnce) update_rows<kRowsAtOnce>(call, row);
  for (; row < call.rows; ++row) update_rows<1>(call, row);
  return kOk;
}
