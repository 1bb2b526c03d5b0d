// The region that all threads run: level after level of a schedule over one chunk of rows.
#include <algorithm>
#include <climits>

#include "engine.h"
#include "turn.h"

namespace engine {
namespace {

constexpr int64_t kRowsAtOnce = 16;
constexpr int64_t kRowsOfThread = 128;  // measured on two cores: with fewer, unpacking weights once more costs as much
constexpr int64_t kTileRows = 16;

// Adds the time in which it exists to what a thread spent, if that is kept.
class Stopwatch {
 public:
  Stopwatch(int64_t* spent, Spent what) : into_(spent ? spent + what : nullptr), begun_(into_ ? nanoseconds() : 0) {}
  ~Stopwatch() {
    if (into_) *into_ += nanoseconds() - begun_;
  }

 private:
  int64_t* into_;
  int64_t begun_;
};

// One line of memory after another, as long as there are some.
class Fetch {
 public:
  explicit Fetch(const std::vector<Soon>& soon) : next_(soon.data()), end_(next_ + soon.size()) {}
  bool operator()() {
    if (next_ == end_) return false;
    __builtin_prefetch(next_->at + 64 * line_);
    if (++line_ == next_->lines) ++next_, line_ = 0;
    return true;
  }

 private:
  const Soon *next_, *end_;
  int64_t line_ = 0;
};

}  // namespace

struct Engine::Job {
  Engine* engine;
  const Way* way;
  float* logits;
  bool alone;                             // thread 0 does the parts of all
  std::atomic<int32_t> stop{INT_MAX};     // the level before which all stop; only thread 0 sets it
  int64_t waited = 0;                     // nanoseconds of thread 0, beyond what equal shares may take
};

// Where a lot of at most `most` rows ends that begins at `from` of `count`: half way where a few rows would be left, which linear
// layers take by sums of another order.
static int64_t lot_end(int64_t from, int64_t count, int64_t most) {
  const int64_t left = count - from;
  if (left <= most || left > most + kTileRows) return std::min(count, from + most);
  return from + std::min(most, ceil_to((left + 1) / 2, kTileRows));
}

// Where a chunk ends: anywhere, or behind as many whole texts as linear layers take at once, and at least one.
int64_t Engine::chunk_end(const Tokens& tokens, int64_t from) const {
  if (!whole_) return lot_end(from, tokens.count, chunk_);
  int64_t end = from;
  while (end < tokens.count) {
    int64_t next = end + 1;
    while (next < tokens.count && tokens.sequences[next] == tokens.sequences[end]) ++next;
    if (end > from && next - from > kLinearRows) break;
    end = next;
  }
  return end;
}

int32_t Engine::all_chunks(const Tokens& tokens, float* logits) {
  int64_t next_wanted = 0;
  for (int64_t from = 0, until; from < tokens.count; from = until) {
    until = chunk_end(tokens, from);
    const int64_t begun = next_wanted;
    load(tokens, from, until, next_wanted);
    const Way& way = (all_.adapters.empty() ? plain_ : adapted_)[all_.count() > kMirroredRows];
    const bool brief = all_.count() <= kBriefRows;
    float* to = plan_.logits < 0 ? nullptr : logits + begun * widths_[plan_.logits];
    Job job{this, &way, to, brief && alone_.begin()};
    if (job.alone) {
      work(0, &job);
    } else {
      const int64_t start = nanoseconds();
      job.waited += pool_->run(work, &job);
      const int64_t took = nanoseconds() - start;
      if (brief) alone_.waited(plan_.threads * (took - job.waited) < took);
    }
    if (job.stop.load() != INT_MAX || cancelled_.load()) return kCancelled;
  }
  return kOk;
}

void Engine::work(int thread, void* context) {
  Job& job = *static_cast<Job*>(context);
  Engine& own = *job.engine;
  const Schedule& schedule = job.way->schedule;
  const auto levels = static_cast<int32_t>(schedule.levels.size());
  const int64_t capacity = schedule.mirrored ? kMirroredRoom : own.chunk_;
  const int last_part = job.alone ? own.plan_.threads - 1 : thread;
  const Turn all{schedule, own.all_, thread, thread, last_part, job.logits, capacity};
  const Turn tail{schedule, own.wanted_, thread, thread, last_part, job.logits, capacity};
  int64_t* spent = own.profiled_ ? own.spent_.data() + kSpents * thread : nullptr;
  const auto& soon = job.way->soon;
  const auto meet = [&](int32_t level) {
    if (job.alone) return;
    const Stopwatch watch(spent, kInWaiting);
    const int64_t waited = own.pool_->barrier.meet(Fetch(soon[level * own.plan_.threads + thread]));
    if (thread == 0) job.waited += waited;
  };
  for (int32_t level = 0; level < levels; ++level) {
    const Turn& turn = level < schedule.tail ? all : tail;
    if (turn.batch.count() == 0) return;
    if (level == schedule.tail && tail.batch.count() < all.batch.count()) {
      own.carry(turn);
      meet(level);
    }
    own.level(turn, level, spent);
    if (level + 1 == levels) return;
    if (thread == 0 && own.cancelled_.load(std::memory_order_relaxed)) job.stop.store(level);
    meet(level);
    if (level >= job.stop.load()) return;
  }
}

void Engine::level(const Turn& turn, int32_t number, int64_t* spent) const {
  const std::vector<Task>& tasks = turn.schedule.levels[number];
  for (auto task = tasks.begin(); task != tasks.end();) {
    const Stopwatch watch(spent, static_cast<Spent>(task->work));
    if (task->work == Work::kRows) {
      const auto end = std::find_if(task, tasks.end(), [](const Task& t) { return t.work != Work::kRows; });
      rows(turn, &*task, &*task + (end - task));
      task = end;
      continue;
    }
    if (task->work == Work::kPrepare || task->work == Work::kMultiply) linear(turn, *task);
    if (task->work == Work::kMix) mix(turn, steps_[task->step]);
    if (task->work == Work::kAppend || task->work == Work::kAttend) attention(turn, *task);
    if (task->work == Work::kScan) scan(turn, steps_[task->step]);
    ++task;
  }
}

float* Engine::buffer(const Turn& turn, int32_t number) const {
  const Buffer& own = turn.schedule.buffers[number];
  if (plan_.logits >= 0 && number == turn.schedule.views[plan_.logits].buffer) return turn.logits;
  float* memory = shared_.floats();
  if (!own.shared) memory = reinterpret_cast<float*>(own_.at() + turn.thread * own_bytes_);
  return memory + own.at * turn.capacity;
}

float* Engine::reg(const Turn& turn, int32_t number, int64_t& stride) const {
  stride = 0;
  if (number < 0) return nullptr;
  const View& view = turn.schedule.views[number];
  const bool logits = plan_.logits >= 0 && view.buffer == turn.schedule.views[plan_.logits].buffer;
  stride = logits ? widths_[plan_.logits] : turn.schedule.buffers[view.buffer].floats;
  return buffer(turn, view.buffer) + view.column;
}

RowsCall Engine::rows_call(const Turn& turn, const Step& step) const {
  RowsCall call{};
  call.step = &step;
  call.weights = weights_.data();
  call.x = reg(turn, step.x, call.x_stride);
  call.y = reg(turn, step.y, call.y_stride);
  call.to = reg(turn, step.to, call.to_stride);
  call.x_width = step.x < 0 ? 0 : widths_[step.x];
  call.width = widths_[step.to];
  call.ids = turn.batch.ids.data();
  call.positions = turn.batch.positions.data();
  call.last = call.width;
  return call;
}

// Some rows go through all tasks before the next ones begin: what one task leaves is in a near cache for another.
void Engine::rows(const Turn& turn, const Task* begin, const Task* end) const {
  const int64_t count = turn.batch.count();
  const int64_t from = turn.schedule.mirrored ? 0 : count * turn.first_part / plan_.threads;
  const int64_t until = turn.schedule.mirrored ? count : count * (turn.last_part + 1) / plan_.threads;
  for (int64_t row = from; row < until; row += kRowsAtOnce)
    for (const Task* task = begin; task != end; ++task)
      rows(turn, steps_[task->step], row, std::min(until, row + kRowsAtOnce));
}

void Engine::rows(const Turn& turn, const Step& step, int64_t from, int64_t until) const {
  RowsCall call = rows_call(turn, step);
  call.from = from;
  call.until = until;
  if (turn.schedule.mirrored && turn.thread != 0 && step.to == plan_.logits) return;  // there is one of it
  if (step.op != kEmbedding || weights_[step.weight].form >= kFloat32) {
    rows_at_(call);
    update_written(turn, call);
    return;
  }
  LinearPart part{};
  part.stage = kReadRow;
  part.call.packed = weights_[step.weight].at;
  for (int64_t row = call.from; row < call.until; ++row) {
    part.row = call.ids[row];
    part.call.y = call.to + row * call.to_stride;
    linear_at_[weights_[step.weight].form](part);
  }
}

// Rows of a text that is longer than what a kernel takes go through it one after another, each lot with a place
// of its own where it is prepared.
void Engine::linear(const Turn& turn, const Task& task) const {
  const int64_t count = turn.batch.count();
  for (int64_t from = 0, until; from < count; from = until) {
    until = lot_end(from, count, kLinearRows);
    linear(turn, task, from, until - from);
  }
}

Epilogue Engine::epilogue(const Turn& turn, const Fused& fused, int64_t from) const {
  Epilogue epilogue;
  if (fused.act >= 0) epilogue.act = act_at_, epilogue.kind = steps_[fused.act].kind;
  if (fused.times >= 0) epilogue.times = reg(turn, fused.times, epilogue.times_stride) + from * epilogue.times_stride;
  if (fused.plus >= 0) epilogue.plus = reg(turn, fused.plus, epilogue.plus_stride) + from * epilogue.plus_stride;
  return epilogue;
}

// `count` rows of a lot, as many as a kernel takes at once. With many for each, a thread multiplies rows of its own by all
// weights: what it reads then is in its cache, as it wrote it. With fewer, reading weights takes longest, and it multiplies all
// rows by outputs of its own.
void Engine::linear(const Turn& turn, const Task& task, int64_t lot, int64_t count) const {
  const int64_t threads = plan_.threads;
  const bool by_rows = threads > 1 && !turn.schedule.mirrored && count >= kRowsOfThread * threads;
  if (task.work == Work::kPrepare && turn.schedule.mirrored) return linear(turn, task, lot, {0, count, 0, 1});
  const auto begin = [&](int64_t part) { return part == threads ? count : count * part / threads / kTileRows * kTileRows; };
  for (int part = turn.first_part; part <= turn.last_part; ++part)
    if (by_rows)
      linear(turn, task, lot, {begin(part), begin(part + 1), 0, 1});
    else
      linear(turn, task, lot, {0, count, part, plan_.threads});
}

void Engine::linear(const Turn& turn, const Task& task, int64_t lot, const LotPart& own) const {
  const int64_t from = lot + own.begin;
  const Step& step = steps_[task.step];
  const Weight& weight = weights_[step.weight];
  LinearPart part{};
  part.call.packed = weight.at;
  float* x = reg(turn, step.x, part.call.stride);
  part.call.x = x + from * part.call.stride;
  part.call.bias = step.bias < 0 ? nullptr : weights_[step.bias].at;
  const Fused& fused = turn.schedule.fused[task.step];
  float* y = reg(turn, fused.to, part.call.y_stride);
  part.call.y = y + from * part.call.y_stride;
  const Epilogue epilogue = this->epilogue(turn, fused, from);
  if (fused.to != step.to) part.call.epilogue = &epilogue;
  part.call.rows = own.end - own.begin;
  part.call.x_float = part.call.bias_float = 1;
  if (own.parts == plan_.threads) part.call.bounds = bounds_[step.weight].data();
  part.stage = task.work == Work::kPrepare ? kPrepare : kMultiply;
  const int64_t floats = turn.schedule.buffers[task.prepared].floats, row = (floats - 16) / 2;
  const int64_t each = row * std::min(turn.capacity, kLinearRows);
  float* prepared = buffer(turn, task.prepared) + lot * floats;
  part.rows = reinterpret_cast<uint8_t*>(prepared + own.begin * row);
  part.words = reinterpret_cast<uint8_t*>(prepared + each + own.begin * row);
  part.scales = prepared + 2 * each + own.begin;
  part.panels = panels_.at() + (own.parts == 1 ? turn.thread * kPanelBytes : 0);  // of all parts
  part.batch_invariant = plan_.batch_invariant;
  part.part = own.part;
  part.parts = own.parts;
  linear_at_[weight.form](part);
  if (part.stage == kMultiply) update_product(turn, part, task.step, from);
}

void Engine::attention(const Turn& turn, const Task& task) const {
  const Step& step = steps_[task.step];
  AttendCall call{};
  call.step = &step;
  call.q = reg(turn, step.x, call.q_stride);
  call.k = reg(turn, step.y, call.k_stride);
  call.v = reg(turn, step.z, call.v_stride);
  call.to = reg(turn, step.to, call.to_stride);
  call.sinks = step.weight < 0 ? nullptr : reinterpret_cast<const float*>(weights_[step.weight].at);
  call.slopes = step.skip < 0 ? nullptr : reinterpret_cast<const float*>(weights_[step.skip].at);
  if (step.bias >= 0) {
    call.distances = reinterpret_cast<const float*>(weights_[step.bias].at);
    call.distance_count = weights_[step.bias].k;
  }
  call.runs = turn.batch.runs.data();
  call.run_count = static_cast<int64_t>(turn.batch.runs.size());
  const Engine& own = step.op == kRecall ? *encoder_ : *this;
  call.rooms = own.rooms_[step.slot].data();
  call.head_bytes = own.cache_.head_bytes(step.slot);
  call.block_bytes = own.cache_.block_bytes(step.slot);
  call.numbers = own.slots_[step.slot].numbers;
  call.pieces = {pieces_.floats(), const_cast<Pieces::Count*>(counts_.data())};
  call.append = task.work == Work::kAppend;
  call.batch_invariant = plan_.batch_invariant;
  call.parts = plan_.threads;
  for (call.part = turn.first_part; call.part <= turn.last_part; ++call.part) attend_at_(call);
}

// Rows whose logits are wanted move to the front of what is used from here on.
void Engine::carry(const Turn& turn) const {
  for (int32_t number : turn.schedule.carried) {
    const Buffer& own = turn.schedule.buffers[number];
    if (own.shared && turn.thread != 0) continue;
    float* memory = buffer(turn, number);
    for (int64_t to = 0; to < turn.batch.count(); ++to) {
      const float* from = memory + turn.batch.rows[to] * own.floats;
      if (turn.batch.rows[to] != to) std::copy(from, from + own.floats, memory + to * own.floats);
    }
  }
}

}  // namespace engine
