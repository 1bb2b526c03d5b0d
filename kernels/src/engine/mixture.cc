// Mixtures of experts: every thread computes some outputs of all experts that any row asks for.
#include <algorithm>

#include "engine.h"
#include "turn.h"

namespace engine {
namespace {

// A row of the batch that asks for an expert, as the choice of so many before it.
struct Pick {
  int32_t row, choice;
};

// The picks of each expert, one expert after another.
struct Picks {
  int32_t* starts;  // [experts + 1]
  Pick* picks;
  Picks(uint8_t* room, int64_t experts)
      : starts(reinterpret_cast<int32_t*>(room)), picks(reinterpret_cast<Pick*>(room + 4 * (experts + 2))) {}

  void sort(const Step& step, const float* chosen, int64_t stride, int64_t rows) {
    const auto expert = [&](int64_t row, int64_t n) {
      const float number = chosen[row * stride + step.block + n];
      return number >= 0 && number < step.count ? static_cast<int64_t>(number) : 0;
    };
    std::fill(starts, starts + step.count + 2, 0);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < step.block; ++n) ++starts[expert(row, n) + 2];
    for (int64_t e = 2; e <= step.count; ++e) starts[e] += starts[e - 1];
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < step.block; ++n)
        picks[starts[expert(row, n) + 1]++] = {static_cast<int32_t>(row), static_cast<int32_t>(n)};
  }
};

}  // namespace

bool Engine::reserve_mixtures() {
  const int64_t rows = std::max(chunk_, kMirroredRoom);
  for (const Step& step : steps_) {
    if (step.op != kExperts) continue;
    for (int32_t e = 0; e < step.count; ++e) {
      const Header head = Packed(weights_[step.weight + e].at).head;
      const auto most = [](int64_t& own, int64_t bytes) { own = std::max(own, ceil_to(bytes, 64)); };
      most(mixture_.x, kMixedRows * head.k * 4);
      most(mixture_.y, kMixedRows * head.n * 4);
      most(mixture_.prepared, kMixedRows * head.tiles * prepared_bytes(head));
      most(mixture_.picked, 4 * (step.count + 2) + rows * step.block * int64_t(sizeof(Pick)));
    }
  }
  return mixture_.bytes() == 0 || mixed_.make(mixture_.bytes() * plan_.threads);
}

void Engine::mix(const Turn& turn, const Step& step) const {
  if (step.op == kExperts) return experts(turn, step);
  RowsCall call = rows_call(turn, step);
  const int64_t count = turn.batch.count(), parts = plan_.threads;
  call.until = count;
  if (turn.schedule.mirrored) {
    call.first = call.width * turn.first_part / parts;
    call.last = call.width * (turn.last_part + 1) / parts;
  } else {
    call.from = count * turn.first_part / parts;
    call.until = count * (turn.last_part + 1) / parts;
  }
  rows_at_(call);
}

// A thread has the same outputs of all experts, so it alone adds to them, in the order of the experts.
void Engine::experts(const Turn& turn, const Step& step) const {
  const Header head = Packed(weights_[step.weight].at).head;
  const int64_t n = head.n, k = head.k, blocks = head.blocks;
  const int64_t bounds[2] = {blocks * turn.first_part / plan_.threads,
                             blocks * (turn.last_part + 1) / plan_.threads};
  const int64_t first = 16 * bounds[0], last = std::min(n, 16 * bounds[1]);
  if (first >= last) return;
  int64_t x_stride, chosen_stride, to_stride;
  const float* x = reg(turn, step.x, x_stride);
  const float* chosen = reg(turn, step.y, chosen_stride);
  float* to = reg(turn, step.to, to_stride);
  const int64_t rows = turn.batch.count();
  uint8_t* room = mixed_.at() + turn.thread * mixture_.bytes();
  auto* gathered = reinterpret_cast<float*>(room);
  auto* found = reinterpret_cast<float*>(room + mixture_.x);
  uint8_t* prepared = room + mixture_.x + mixture_.y;
  Picks picks(prepared + 2 * mixture_.prepared, step.count);
  picks.sort(step, chosen, chosen_stride, rows);
  float scales[kMixedRows];
  for (int64_t row = 0; step.kind && row < rows; ++row)
    std::fill(to + row * to_stride + first, to + row * to_stride + last, 0.0f);
  for (int64_t e = 0; e < step.count; ++e)
    for (int64_t at = picks.starts[e], count; at < picks.starts[e + 1]; at += count) {
      count = std::min<int64_t>(kMixedRows, picks.starts[e + 1] - at);
      const Pick* own = picks.picks + at;
      const auto source = [&](const Pick& pick) { return x + pick.row * x_stride + pick.choice * step.stride; };
      const auto target = [&](const Pick& pick) { return to + pick.row * to_stride + pick.choice * n; };
      const bool direct = count == 1 && !step.kind;
      for (int64_t i = 0; count > 1 && i < count; ++i) std::copy_n(source(own[i]), k, gathered + i * k);
      LinearPart part{};
      part.call.packed = weights_[step.weight + e].at;
      part.call.x = count > 1 ? gathered : source(own[0]);
      part.call.bias = step.bias < 0 ? nullptr : vector(step.bias) + e * n;
      part.call.y = direct ? target(own[0]) : found;
      part.call.rows = count;
      part.call.stride = k;
      part.call.x_float = part.call.bias_float = 1;
      part.call.bounds = bounds;
      part.parts = 1;
      part.rows = prepared;
      part.words = prepared + mixture_.prepared;
      part.scales = scales;
      part.panels = panels_.at() + turn.thread * kPanelBytes;
      part.batch_invariant = plan_.batch_invariant;
      for (const Stage stage : {kPrepare, kMultiply}) {
        part.stage = stage;
        linear_at_[weights_[step.weight + e].form](part);
      }
      for (int64_t i = 0; !direct && i < count; ++i) {
        const float* from = found + i * n;
        if (!step.kind) {
          std::copy(from + first, from + last, target(own[i]) + first);
          continue;
        }
        const float weight = chosen[own[i].row * chosen_stride + own[i].choice];
        float* sum = to + own[i].row * to_stride;
        for (int64_t c = first; c < last; ++c) sum[c] += weight * from[c];
      }
    }
}

}  // namespace engine
