// Steps that keep a state of each sequence: one thread's part of the channels or heads of all rows.
#include <algorithm>

#include "engine.h"
#include "turn.h"

namespace engine {

const float* Engine::vector(int32_t weight) const {
  return weight < 0 ? nullptr : reinterpret_cast<const float*>(weights_[weight].at);
}

// The rows of a run in a register.
Rows Engine::rows_of(const Turn& turn, int32_t number, const Run& run) const {
  int64_t stride;
  const float* first = reg(turn, number, stride);
  return {first ? first + run.first * stride : nullptr, 0, stride};
}

void Engine::scan(const Turn& turn, const Step& step) const {
  for (int part = turn.first_part; part <= turn.last_part; ++part)
    for (const Run& run : turn.batch.runs) {
      if (step.op == kConvolve) convolve(turn, step, run, part);
      if (step.op == kSsd) ssd(turn, step, run, part);
      if (step.op == kSelective) selective(turn, step, run, part);
      if (step.op == kDelta) delta(turn, step, run, part);
    }
}

// The state is the last k - 1 rows of x, oldest first.
void Engine::convolve(const Turn& turn, const Step& step, const Run& run, int part) const {
  const int64_t wide = widths_[step.to], blocks = (wide + 15) / 16, kept = step.count - 1;
  const int64_t from = 16 * (blocks * part / plan_.threads);
  const int64_t until = std::min(wide, 16 * (blocks * (part + 1) / plan_.threads));
  if (from >= until) return;
  float* after = states_.after(run.sequence, step.state) + from;
  const float* before = run.continued ? after : states_.before(run.sequence, step.state) + from;
  int64_t stride;
  const float* x = reg(turn, step.x, stride) + run.first * stride + from;
  float* y = reg(turn, step.to, stride) + run.first * stride + from;
  CausalConvCall call{};
  call.x = rows_of(turn, step.x, run);
  call.x.at = x;
  call.weight = vector(step.weight) + from;
  call.bias = step.bias < 0 ? nullptr : vector(step.bias) + from;
  call.before = before;
  call.y = y;
  call.live.length = call.length = run.count;
  call.batches = call.is_float = call.threads = 1;
  call.channels = until - from;
  call.k = step.count;
  call.silu = step.kind;
  call.wide = wide;
  convolve_at_(call);
  for (int64_t i = 0; i < kept; ++i) {  // rows move to the front: none is read after it was written
    const int64_t row = run.count - kept + i;
    const float* source = row < 0 ? before + (row + kept) * wide : x + row * call.x.step;
    std::copy(source, source + (until - from), after + i * wide);
  }
}

void Engine::ssd(const Turn& turn, const Step& step, const Run& run, int part) const {
  SsdScanCall call{};
  call.x = rows_of(turn, step.x, run);
  call.dt = rows_of(turn, step.y, run);
  call.b = rows_of(turn, step.z, run);
  call.c = rows_of(turn, step.c, run);
  call.a = vector(step.weight);
  call.d = vector(step.skip);
  call.bias = vector(step.bias);
  call.y = const_cast<void*>(rows_of(turn, step.to, run).at);
  call.state = states_.after(run.sequence, step.state);
  call.before = run.continued ? nullptr : states_.before(run.sequence, step.state);
  call.live.length = call.length = run.count;
  call.batches = call.is_float = call.in_lanes = 1;
  call.heads = step.heads;
  call.p = step.head_dim;
  call.groups = step.kv_heads;
  call.n = step.states;
  call.least = step.number;
  call.most = step.most;
  call.softplus = step.kind;
  call.threads = call.parts = plan_.threads;
  call.part = part;
  ssd_at_(call);
}

void Engine::selective(const Turn& turn, const Step& step, const Run& run, int part) const {
  SelectiveScanCall call{};
  call.x = rows_of(turn, step.x, run);
  call.dt = rows_of(turn, step.y, run);
  call.dt_channel = 1;
  call.z = rows_of(turn, step.gate, run);
  call.b = rows_of(turn, step.z, run);
  call.c = rows_of(turn, step.c, run);
  call.a = rates_[step.state].data();
  call.d = vector(step.skip);
  call.bias = vector(step.bias);
  call.y = const_cast<void*>(rows_of(turn, step.to, run).at);
  call.state = states_.after(run.sequence, step.state);
  call.before = run.continued ? nullptr : states_.before(run.sequence, step.state);
  call.live.length = call.length = run.count;
  call.batches = call.is_float = call.in_lanes = 1;
  call.channels = widths_[step.to];
  call.n = step.states;
  call.softplus = step.kind;
  call.threads = call.parts = plan_.threads;
  call.part = part;
  selective_at_(call);
}

void Engine::delta(const Turn& turn, const Step& step, const Run& run, int part) const {
  DeltaRuleCall call{};
  call.q = rows_of(turn, step.c, run);
  call.k = rows_of(turn, step.z, run);
  call.v = rows_of(turn, step.x, run);
  call.decay = rows_of(turn, step.y, run);
  call.beta = rows_of(turn, step.gate, run);
  call.y = static_cast<float*>(const_cast<void*>(rows_of(turn, step.to, run).at));
  call.state = states_.after(run.sequence, step.state);
  call.before = run.continued ? nullptr : states_.before(run.sequence, step.state);
  call.batches = 1;
  call.length = run.count;
  call.heads = step.heads;
  call.groups = step.kv_heads;
  call.n = step.head_dim;
  call.p = step.value_dim;
  call.by_channel = step.kind;
  call.threads = call.parts = plan_.threads;
  call.part = part;
  delta_at_(call);
}

// A of every selective scan as its kernel reads it: [16 channels at a time][states][16].
void Engine::turn_rates() {
  for (const Step& step : steps_) {
    if (!has_state(step)) continue;
    rates_.emplace_back();
    if (step.op != kSelective) continue;
    const int64_t channels = widths_[step.to], n = step.states;
    rates_.back().resize(ceil_to(channels, 16) * n);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < n; ++i)
        rates_.back()[(c / 16 * n + i) * 16 + c % 16] = vector(step.weight)[c * n + i];
  }
}

}  // namespace engine
