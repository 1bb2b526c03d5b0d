#include "schedule.h"

#include <algorithm>

#include "../share.h"

namespace engine {
namespace {

bool is_view(const Step& step) { return step.op == kColumns && step.count == 1; }

// Rows an even number of lines apart fall into few sets of a cache: of 16 columns, as products write and read them, no
// more rows than these sets have ways would stay.
int64_t padded_stride(int32_t width) { return width < 256 ? width : ((width + 15) / 16 | 1) * 16; }

// Whether each thread computes the same outputs of both weights.
bool same_shares(const Plan& plan, int32_t one, int32_t other) {
  const Packed a(plan.weights[one].at), b(plan.weights[other].at);
  if (a.head.n != b.head.n) return false;
  for (int part = 1; part < plan.threads; ++part)
    if (Share::bound(a, part, plan.threads) != Share::bound(b, part, plan.threads)) return false;
  return true;
}

// The step that reads each register, -1 where there is none, or more than one, or the caller does.
std::vector<int32_t> sole_readers(const Plan& plan) {
  std::vector<int32_t> readers(plan.register_count, -1), counts(plan.register_count);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    const Step& step = plan.steps[i];
    for (int32_t from : {step.x, step.y, step.z, step.c, step.gate})
      if (from >= 0) ++counts[from], readers[from] = i;
  }
  if (plan.logits >= 0) ++counts[plan.logits];
  for (int32_t reg = 0; reg < plan.register_count; ++reg)
    if (counts[reg] != 1 || reg == plan.logits) readers[reg] = -1;
  return readers;
}

}  // namespace

Schedule::Schedule(const Plan& plan, bool mirrored, bool adapted) : mirrored(mirrored), adapted(adapted) {
  fuse(plan);
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

// A product takes over the steps behind it as long as each is the only one that reads what it makes, and what else that
// step reads is there: made before, or by a product at whose outputs the same thread works.
void Schedule::fuse(const Plan& plan) {
  const auto readers = sole_readers(plan);
  std::vector<int32_t> makers(plan.register_count, -1), products(plan.register_count, -1), writers(plan.register_count);
  for (int32_t i = 0; i < plan.step_count; ++i)
    if (plan.steps[i].to >= 0) writers[plan.steps[i].to] = i;
  fused.assign(plan.step_count, {});
  absorbed_.assign(plan.step_count, false);
  in_place_.assign(plan.step_count, false);
  of_product_.assign(plan.register_count, false);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    const Step& step = plan.steps[i];
    if (step.to < 0 || absorbed_[i]) continue;
    Fused& own = fused[i];
    own.to = step.to;
    while (step.op == kLinear && !mirrored && !adapted && readers[own.to] >= 0) {
      const Step& next = plan.steps[readers[own.to]];
      const int32_t other = next.x == own.to ? next.y : next.x;
      const bool there = other >= 0 && makers[other] >= 0 && plan.widths[other] == plan.widths[step.to] &&
                         (products[other] < 0 || same_shares(plan, step.weight, plan.steps[products[other]].weight));
      if (next.op == kAct && own.act < 0 && own.times < 0 && own.plus < 0) {
        own.act = readers[own.to];
      } else if (next.op == kMul && there && own.times < 0 && own.plus < 0) {
        own.times = other;
        in_place_[i] = products[other] >= 0 && readers[other] >= 0;
      } else if (next.op == kAdd && there && own.plus < 0) {
        own.plus = other;
      } else {
        break;
      }
      absorbed_[readers[own.to]] = true;
      own.to = next.to;
    }
    if (absorbed_[writers[own.to]] || writers[own.to] == i) makers[own.to] = i;
    if (step.op == kLinear) products[own.to] = i, of_product_[own.to] = true;
    in_place_[i] = in_place_[i] && own.to != plan.logits;
  }
}

// A slice of a register is the same memory, seen from another column.
void Schedule::lay_views(const Plan& plan) {
  views.resize(plan.register_count);
  std::vector<bool> seen(plan.register_count);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    const Step& step = plan.steps[i];
    if (step.to < 0 || absorbed_[i]) continue;
    const int32_t to = fused[i].to;
    if (is_view(step)) {
      views[to] = {views[step.x].buffer, views[step.x].column + step.start};
    } else if (in_place_[i]) {
      views[to] = views[fused[i].times];
    } else if (!seen[to]) {
      views[to] = {static_cast<int32_t>(buffers.size()), 0};
      buffers.emplace_back();
      buffers.back().floats = step.op == kLinear ? padded_stride(plan.widths[to]) : plan.widths[to];
    }
    seen[to] = true;
  }
}

void Schedule::order(const Plan& plan) {
  levels.clear();
  prepared_.clear();
  made_.assign(buffers.size(), -1);
  by_rows_.assign(buffers.size(), false);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    const Step& step = plan.steps[i];
    if (is_view(step) || absorbed_[i]) continue;
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
  const int32_t words = static_cast<int32_t>(head.tiles * prepared_bytes(head) / 4);
  const int32_t apart = mirrored ? 0 : 1;
  int32_t level = ready(step.x, false), operands_ready = 0;
  for (int32_t other : {fused[number].times, fused[number].plus})
    if (other >= 0)
      operands_ready = std::max(operands_ready, of_product_[other] ? made_[views[other].buffer] : ready(other, false));
  const bool behind = tail > 0 && std::max(level + apart, operands_ready) >= tail;
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
  level = std::max(found->level + apart, operands_ready);
  for (int32_t other : {fused[number].times, fused[number].plus, adapted ? step.x : -1}) use(other, level);
  Buffer& prepared = buffers[found->buffer];
  prepared.last = std::max(prepared.last, level);
  add(Work::kMultiply, number, found->buffer, level);
  make(fused[number].to, level, false);
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
