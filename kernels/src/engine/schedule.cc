#include "schedule.h"

#include <algorithm>

namespace engine {
namespace {

bool is_view(const Step& step) { return step.op == kColumns && step.count == 1; }

}  // namespace

Schedule::Schedule(const Plan& plan, bool mirrored) : mirrored(mirrored) {
  lay_views(plan);
  const auto fresh = buffers;
  tail = 0;
  order(plan);  // once to learn where the last attention or scan is
  const auto attends = [](const std::vector<Task>& level) {
    return std::any_of(level.begin(), level.end(), [](const Task& t) { return t.work >= Work::kAttend; });
  };
  const auto last = std::find_if(levels.rbegin(), levels.rend(), attends);
  tail = static_cast<int32_t>(plan.logits < 0 ? levels.size() : levels.rend() - last);
  buffers = fresh;
  order(plan);
  // Logits go to where the caller wants them.
  if (plan.logits >= 0) buffers[views[plan.logits].buffer].floats = 0;
  place();
}

// A slice of a register is the same memory, seen from another column.
void Schedule::lay_views(const Plan& plan) {
  views.resize(plan.register_count);
  std::vector<bool> seen(plan.register_count);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    const Step& step = plan.steps[i];
    if (step.to < 0) continue;
    if (is_view(step)) {
      views[step.to] = {views[step.x].buffer, views[step.x].column + step.start};
    } else if (!seen[step.to]) {
      views[step.to] = {static_cast<int32_t>(buffers.size()), 0};
      buffers.emplace_back();
      buffers.back().floats = plan.widths[step.to];
    }
    seen[step.to] = true;
  }
}

void Schedule::order(const Plan& plan) {
  levels.clear();
  prepared_.clear();
  made_.assign(buffers.size(), -1);
  by_rows_.assign(buffers.size(), false);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    const Step& step = plan.steps[i];
    if (is_view(step)) continue;
    if (step.op == kLinear) {
      add_linear(plan, i);
    } else if (step.op == kAttention || step.op == kRemember || step.op == kRecall) {
      add_attention(plan, i);
    } else if (has_state(step)) {
      add_whole(plan, i, Work::kScan);
    } else if (step.op == kScores || step.op == kExperts) {
      add_whole(plan, i, Work::kMix);
    } else {
      int32_t level = 0;
      for (int32_t from : {step.x, step.y}) level = std::max(level, ready(from, true));
      if (step.op == kPlace) level = std::max(level, made_[views[step.to].buffer]);
      for (int32_t from : {step.x, step.y}) use(from, level);
      add(Work::kRows, i, -1, level);
      make(step.to, level, true);
    }
  }
  use(plan.logits, static_cast<int32_t>(levels.size()) - 1);
}

// The first level in which a register may be read, by a step that works row by row or by another one.
int32_t Schedule::ready(int32_t reg, bool by_rows) const {
  if (reg < 0) return 0;
  const int32_t buffer = views[reg].buffer;
  return made_[buffer] + !(by_rows_[buffer] && (mirrored || by_rows));
}

void Schedule::use(int32_t reg, int32_t level) {
  if (reg < 0) return;
  Buffer& buffer = buffers[views[reg].buffer];
  buffer.last = std::max(buffer.last, level);
}

void Schedule::make(int32_t reg, int32_t level, bool by_rows) {
  const int32_t number = views[reg].buffer;
  Buffer& buffer = buffers[number];
  if (buffer.first < 0) buffer.first = level;
  buffer.last = std::max(buffer.last, level);
  buffer.shared = !(mirrored && by_rows);
  made_[number] = level;
  by_rows_[number] = by_rows;
}

void Schedule::add(Work work, int32_t step, int32_t prepared, int32_t level) {
  if (static_cast<int32_t>(levels.size()) <= level) levels.resize(level + 1);
  levels[level].push_back({work, step, prepared});
}

// x is prepared once for all weights that meet it in the same form and on the same side of the tail.
void Schedule::add_linear(const Plan& plan, int32_t number) {
  const Step& step = plan.steps[number];
  const Packed packed(plan.weights[step.weight].at);
  const Header& head = packed.head;
  // 0: bfloat16. Blocks take few rows as words where the other kinds take tiles. Inputs of 16 bits are more words.
  const int32_t form = static_cast<int32_t>(
      is_int8(head.kind) ? 1 : head.kind == kBlockBf16 ? 2 : group_of(head));
  const int32_t words = static_cast<int32_t>(head.tiles * x_bytes(head) / 4);
  const int32_t apart = mirrored ? 0 : 1;
  int32_t level = ready(step.x, false);
  const bool behind = tail > 0 && level + apart >= tail;
  if (behind) level = std::max(level, tail);
  auto found = std::find_if(prepared_.begin(), prepared_.end(), [&](const Prepared& p) {
    return p.x == step.x && p.tail == behind && p.words == words && p.form == form;
  });
  if (found == prepared_.end()) {
    Buffer buffer;
    buffer.floats = 2 * words + 16;  // the row, the row again in words, and a scale
    buffer.shared = !mirrored;
    buffer.first = level;
    prepared_.push_back({step.x, behind, words, form, static_cast<int32_t>(buffers.size()), level});
    buffers.push_back(buffer);
    found = prepared_.end() - 1;
    use(step.x, level);
    add(Work::kPrepare, number, found->buffer, level);
  }
  level = found->level + apart;
  Buffer& prepared = buffers[found->buffer];
  prepared.last = std::max(prepared.last, level);
  add(Work::kMultiply, number, found->buffer, level);
  make(step.to, level, false);
}

void Schedule::add_attention(const Plan& plan, int32_t number) {
  const Step& step = plan.steps[number];
  int32_t level = ready(step.x, false);
  if (step.op != kRecall) {
    const int32_t appended = std::max(ready(step.y, false), ready(step.z, false));
    add(Work::kAppend, number, -1, appended);
    use(step.y, appended);
    use(step.z, appended);
    level = std::max(level, appended + 1);
  }
  if (step.op == kRemember) return;
  use(step.x, level);
  add(Work::kAttend, number, -1, level);
  make(step.to, level, false);
}

// All threads take some channels, heads or outputs of all rows.
void Schedule::add_whole(const Plan& plan, int32_t number, Work work) {
  const Step& step = plan.steps[number];
  const int32_t registers[] = {step.x, step.y, step.z, step.c, step.gate};
  int32_t level = 0;
  for (int32_t from : registers) level = std::max(level, ready(from, false));
  for (int32_t from : registers) use(from, level);
  add(work, number, -1, level);
  make(step.to, level, false);
}

// Buffers whose levels do not overlap share memory.
void Schedule::place() {
  std::vector<int32_t> numbers(buffers.size());
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int32_t>(i);
  std::stable_sort(numbers.begin(), numbers.end(),
                   [&](int32_t a, int32_t b) { return buffers[a].first < buffers[b].first; });
  std::vector<int32_t> placed;
  for (int32_t number : numbers) {
    Buffer& own = buffers[number];
    if (own.first < tail && own.last >= tail) carried.push_back(number);
    std::vector<const Buffer*> beside;
    for (int32_t other : placed) {
      const Buffer& o = buffers[other];
      if (o.shared == own.shared && o.last >= own.first) beside.push_back(&o);
    }
    std::sort(beside.begin(), beside.end(), [](const Buffer* a, const Buffer* b) { return a->at < b->at; });
    for (const Buffer* o : beside) {
      if (own.at + own.floats <= o->at) break;
      own.at = std::max(own.at, (o->at + o->floats + 15) / 16 * 16);
    }
    int64_t& all = own.shared ? shared_floats : own_floats;
    all = std::max(all, (own.at + own.floats + 15) / 16 * 16);
    placed.push_back(number);
  }
}

}  // namespace engine
