// Adapters of an engine, and their updates in a batch.
#include "adapters.h"

#include <algorithm>

#include "engine.h"
#include "turn.h"

namespace engine {
namespace {

constexpr int64_t kBlock = 16;  // columns

// Frees an engine's mark that it runs.
struct Leave {
  std::atomic<bool>& busy;
  ~Leave() { busy.store(false); }
};

// Whether a step's rows are each written whole by one thread, in memory that no other step sees.
bool writes_rows(const Step& step) {
  return step.op == kNorm || (step.op >= kAct && step.op <= kMulVector && step.op != kMean);
}

}  // namespace

// `updates` have been checked by `engine_adapters.py`; their factors stay where they are.
int32_t Engine::add_adapter(const LowRank* updates, int32_t count, int32_t& number) {
  if (busy_.exchange(true)) return kBusy;
  const Leave leave{busy_};
  Adapter adapter{{updates, updates + count}, std::vector<int32_t>(steps_.size(), -1)};
  for (int32_t i = 0; i < count; ++i) {
    const int32_t step = updates[i].step;
    if (step < 0 || step >= plan_.step_count || adapter.of_step[step] >= 0) return kArguments;
    if (updates[i].rank < 1 || updates[i].rank > kMostRank) return kArguments;
    if (steps_[step].op != kLinear && !writes_rows(steps_[step])) return kArguments;
    adapter.of_step[step] = i;
  }
  if (adapted_[0].schedule.levels.empty()) {
    Way ways[2];
    for (Way& way : ways) {
      way.schedule = Schedule(plan_, &way == &ways[0], true);
      look_ahead(way);
    }
    reserve_rows(ways, 2);
    for (int i = 0; i < 2; ++i) std::swap(adapted_[i], ways[i]);
  }
  const auto free = std::find(adapters_.begin(), adapters_.end(), nullptr);
  number = static_cast<int32_t>(free - adapters_.begin());
  if (free == adapters_.end()) adapters_.emplace_back();
  adapters_[number] = std::make_unique<Adapter>(std::move(adapter));
  return kOk;
}

int32_t Engine::remove_adapter(int32_t number) {
  if (busy_.exchange(true)) return kBusy;
  const Leave leave{busy_};
  if (!has_adapter(number)) return kArguments;
  adapters_[number].reset();
  return kOk;
}

// Updates rows from..until-1 of x and y, whose first row is the batch's row `from`, in some blocks of y's columns.
void Engine::update(const Turn& turn, int32_t step, LowRankCall call, int64_t from, int64_t until) const {
  const std::vector<int32_t>& numbers = turn.batch.adapters;
  const float* x = call.x;
  float* y = call.y;
  for (int64_t row = from, next; row < until; row = next) {
    next = row + 1;
    while (next < until && numbers[next] == numbers[row]) ++next;
    if (numbers[row] < 0) continue;
    const Adapter& adapter = *adapters_[numbers[row]];
    if (adapter.of_step[step] < 0) continue;
    call.update = &adapter.updates[adapter.of_step[step]];
    call.x = x + (row - from) * call.x_stride;
    call.y = y + (row - from) * call.y_stride;
    call.rows = next - row;
    low_rank_at_(call);
  }
}

// Of a product: the columns that a thread has computed, or rows of its own.
void Engine::update_product(const Turn& turn, const LinearPart& part, int32_t number, int64_t from) const {
  if (turn.batch.adapters.empty()) return;
  const Step& step = steps_[number];
  const bool whole = part.parts == 1;
  const std::vector<int64_t>& bounds = bounds_[step.weight];
  const int64_t block = whole ? 0 : bounds[part.part], end = whole ? bounds.back() : bounds[part.part + 1];
  LowRankCall call{nullptr, static_cast<const float*>(part.call.x), static_cast<float*>(part.call.y),
                   part.call.stride, part.call.y_stride, 0, widths_[step.x], widths_[step.to], block, end};
  update(turn, number, call, from, from + part.call.rows);
}

// Of a step that works row by row: what it has written.
void Engine::update_written(const Turn& turn, const RowsCall& rows) const {
  if (turn.batch.adapters.empty()) return;
  float* y = rows.to + rows.from * rows.to_stride;
  const int64_t blocks = (rows.width + kBlock - 1) / kBlock;
  LowRankCall call{nullptr, y, y, rows.to_stride, rows.to_stride, 0, rows.width, rows.width, 0, blocks};
  update(turn, static_cast<int32_t>(rows.step - steps_.data()), call, rows.from, rows.until);
}

}  // namespace engine
