#include "engine.h"

#include <algorithm>
#include <new>
#include <utility>

#include "../share.h"

EFFC_TABLE(engine_rows, EngineRows)
EFFC_TABLE(engine_act, ActCall)
EFFC_TABLE(engine_low_rank, EngineLowRank)
EFFC_TABLE(engine_attend, EngineAttend)
#define EFFC_PART(name, kind, numbers, lies) EFFC_TABLE(name##_part, LinearPart)
EFFC_LINEARS(EFFC_PART)
EFFC_TABLE(causal_conv, CausalConvCall)
EFFC_TABLE(ssd_scan, SsdScanCall)
EFFC_TABLE(selective_scan, SelectiveScanCall)
EFFC_TABLE(delta_rule, DeltaRuleCall)

namespace engine {

bool Room::make(int64_t bytes) {
  const auto rounded = static_cast<size_t>(ceil_to(std::max<int64_t>(bytes, 64), 64));
  memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, rounded)));
  return memory_ != nullptr;
}

Engine::Engine(const Plan& plan)
    : steps_(plan.steps, plan.steps + plan.step_count),
      widths_(plan.widths, plan.widths + plan.register_count),
      weights_(plan.weights, plan.weights + plan.weight_count),
      slots_(plan.slots, plan.slots + plan.slot_count), plan_(plan) {
  if (plan.encoder) encoder_ = std::make_unique<Engine>(*plan.encoder);
  plan_.encoder = nullptr;
  plan_.steps = steps_.data();
  plan_.widths = widths_.data();
  plan_.weights = weights_.data();
  plan_.slots = slots_.data();
  rows_at_ = engine_rows_at(plan.level);
  act_at_ = engine_act_at(plan.level);
  low_rank_at_ = engine_low_rank_at(plan.level);
  attend_at_ = engine_attend_at(plan.level);
#define EFFC_PART_AT(name, kind, numbers, lies) linear_at_[kind] = name##_part_at(plan.level);
  EFFC_LINEARS(EFFC_PART_AT)
  convolve_at_ = causal_conv_at(plan.level);
  ssd_at_ = ssd_scan_at(plan.level);
  selective_at_ = selective_scan_at(plan.level);
  delta_at_ = delta_rule_at(plan.level);
  for (Way* way : {&plain_[0], &plain_[1]}) way->schedule = Schedule(plan_, way == &plain_[0], false);
  reserve();
  pool_ = std::make_unique<Pool>(plan.threads);
}

void Engine::reserve() {
  if (!cache_.reserve(plan_) || !states_.reserve(plan_)) throw std::bad_alloc();
  for (int32_t slot = 0; slot < plan_.slot_count; ++slot) {
    rooms_.emplace_back();
    for (int64_t i = 0; i < cache_.sequences(); ++i) rooms_.back().push_back(cache_.slot(i, slot));
  }
  for (const Weight& weight : weights_) {
    bounds_.emplace_back();
    if (weight.form >= kFloat32) continue;
    const Packed packed(weight.at);
    for (int part = 0; part <= plan_.threads; ++part)
      bounds_.back().push_back(Share::bound(packed, part, plan_.threads));
  }
  turn_rates();
  for (Way& way : plain_) look_ahead(way);
  // 256 MiB of rows at most: a wide vocabulary would need a gigabyte of them.
  const int64_t fit = (int64_t(64) << 20) / std::max<int64_t>(1, plain_[1].schedule.shared_floats);
  chunk_ = std::max<int64_t>(16, std::min(kLinearRows, fit) / 16 * 16);  // kernels round rows up to 16 at most
  whole_ = plan_.logits < 0;
  for (const Step& step : steps_) whole_ |= step.op == kAttention && step.count;
  if (whole_) chunk_ = ceil_to(plan_.context, kLinearRows);  // costs memory only as far as texts go
  counts_ = std::vector<Pieces::Count>(plan_.threads);
  spent_.resize(kSpents * plan_.threads);
  reserve_rows(plain_, 2);
  if (!reserve_mixtures() || !panels_.make(kPanelBytes * plan_.threads) || !pieces_.make(2 * kPieceFloats * 4 * plan_.threads))
    throw std::bad_alloc();
}

// Memory for the rows of whichever schedule takes most: what there is stays until there is more.
void Engine::reserve_rows(const Way* ways, int32_t count) {
  int64_t shared = shared_bytes_, own = own_bytes_;
  for (const Way* way = ways; way < ways + count; ++way) {
    const Schedule& schedule = way->schedule;
    shared = std::max(shared, schedule.shared_floats * (schedule.mirrored ? kMirroredRoom : chunk_) * 4);
    own = std::max(own, schedule.own_floats * kMirroredRoom * 4 + 128);
  }
  Room shared_room, own_room;
  if (!shared_room.make(shared) || !own_room.make(own * plan_.threads)) throw std::bad_alloc();
  std::swap(shared_, shared_room);
  std::swap(own_, own_room);
  shared_bytes_ = shared;
  own_bytes_ = own;
}

// Whether a thread reads its blocks from their middle on as well; `tile_stream.h`.
bool two_streams(uint32_t kind, int32_t level) {
  return (level == kAmx || level == kAmxModel) && kind != kBlockBf16 && kind != kDenseInt4;
}

// Behind each level the weights of the next one that has some: what a kernel looks up first, and the first
// 16 KiB of what it streams.
void Engine::look_ahead(Way& way) const {
  const Schedule& schedule = way.schedule;
  std::vector<std::vector<Soon>>& soon = way.soon;
  const int64_t threads = plan_.threads;
  soon.resize(schedule.levels.size() * threads);
  for (int64_t level = static_cast<int64_t>(schedule.levels.size()) - 2; level >= 0; --level)
    for (int64_t thread = 0; thread < threads; ++thread) {
      std::vector<Soon>& own = soon[level * threads + thread];
      for (const Task& task : schedule.levels[level + 1]) {
        if (task.work != Work::kMultiply) continue;
        const int32_t weight = steps_[task.step].weight;
        const Packed packed(weights_[weight].at);
        const int64_t block = bounds_[weight][thread], last = bounds_[weight][thread + 1];
        if (block == last) continue;
        own.push_back({packed.at, 2});
        own.push_back({packed.at + packed.head.offsets_at + 8 * block, 2});
        if (is_int8(packed.head.kind)) {
          own.push_back({packed.at + packed.head.scales_at + 64 * block, 2});
          own.push_back({packed.at + packed.head.sums_at + 64 * block, 2});
        }
        const int64_t lines = (packed.offset(last) - packed.offset(block)) / 64;
        const int64_t half = two_streams(packed.head.kind, plan_.level) ? (last - block) / 2 : 0;
        own.push_back({packed.stream(block), std::min<int64_t>(lines, half ? 128 : 256)});
        if (half) own.push_back({packed.stream(block + half), std::min<int64_t>(lines / 2, 128)});
      }
      if (own.empty()) own = soon[(level + 1) * threads + thread];
    }
}

// What the caller has looked at already, with sentences.
int32_t Engine::check(const Tokens& tokens) const {
  std::vector<int64_t> lengths(plan_.sequences);
  for (int64_t i = 0; i < plan_.sequences; ++i) lengths[i] = cache_.length(i);
  for (int64_t i = 0; i < tokens.count; ++i) {
    const int64_t sequence = tokens.sequences[i];
    if (sequence < 0 || sequence >= plan_.sequences) return kArguments;
    const bool first = i == 0 || tokens.sequences[i - 1] != sequence;
    if (whole_ && first && lengths[sequence]) return kArguments;
    if (encoder_ && source(sequence) == 0) return kArguments;
    if (++lengths[sequence] > plan_.context) return kArguments;
    if (tokens.adapters && tokens.adapters[i] != -1 && !has_adapter(tokens.adapters[i])) return kArguments;
    for (const Step& step : steps_)
      if (step.op == kEmbedding && (tokens.ids[i] < 0 || tokens.ids[i] >= weights_[step.weight].n))
        return kArguments;
  }
  for (int64_t i = 0; i < tokens.wanted_count; ++i)
    if (tokens.wanted[i] < 0 || tokens.wanted[i] >= tokens.count ||
        (i > 0 && tokens.wanted[i] <= tokens.wanted[i - 1]))
      return kArguments;
  return kOk;
}

namespace {

struct Leave {
  std::atomic<bool>& busy;
  ~Leave() { busy.store(false); }
};

}  // namespace

int32_t Engine::run(const Tokens& tokens, float* logits) {
  if (busy_.exchange(true)) return kBusy;
  const Leave leave{busy_};
  cancelled_.store(false);
  if (const int32_t status = check(tokens)) return status;
  if (!pool_->alive()) pool_ = std::make_unique<Pool>(plan_.threads);
  std::vector<int64_t> before(plan_.sequences);
  for (int64_t i = 0; i < plan_.sequences; ++i) before[i] = cache_.length(i);
  const int32_t status = all_chunks(tokens, logits);
  for (int64_t i = 0; status && i < plan_.sequences; ++i) cache_.forget(i, before[i]);
  states_.settle(status == kOk);
  return status;
}

int32_t Engine::encode(const Tokens& tokens) {
  if (!encoder_) return kArguments;
  if (busy_.exchange(true)) return kBusy;
  const Leave leave{busy_};
  return encoder_->run(tokens, nullptr);
}

int32_t Engine::forget(int64_t sequence, int64_t length) {
  if (sequence < 0 || sequence >= cache_.sequences() || length < 0) return kArguments;
  if (busy_.exchange(true)) return kBusy;
  int32_t status = kOk;
  if (length > 0 && length < cache_.length(sequence) && states_.any()) status = kNoWayBack;
  if (length == 0) states_.forget(sequence);
  if (length == 0 && encoder_) status = encoder_->forget(sequence, 0);
  if (!status) cache_.forget(sequence, length);
  busy_.store(false);
  return status;
}

void Engine::profile(int64_t (&spent)[kSpents], bool on) {
  for (int64_t i = 0; i < kSpents; ++i) {
    spent[i] = 0;
    for (int64_t thread = 0; thread < plan_.threads; ++thread)
      spent[i] += std::exchange(spent_[kSpents * thread + i], 0);
  }
  profiled_ = on;
  if (!encoder_) return;
  int64_t more[kSpents];
  encoder_->profile(more, on);
  for (int64_t i = 0; i < kSpents; ++i) spent[i] += more[i];
}

// The rows of a chunk, and of those the wanted ones.
void Engine::load(const Tokens& tokens, int64_t from, int64_t until, int64_t& next_wanted) {
  all_ = Batch();
  wanted_ = Batch();
  const bool adapted = tokens.adapters && std::any_of(tokens.adapters + from, tokens.adapters + until,
                                                      [](int32_t number) { return number >= 0; });
  for (int64_t i = from; i < until; ++i) {
    const int64_t sequence = tokens.sequences[i], position = cache_.length(sequence);
    if (i == from || tokens.sequences[i - 1] != sequence)
      all_.runs.push_back({i - from, 0, position, sequence, states_.move_on(sequence),
                           source(sequence)});
    ++all_.runs.back().count;
    all_.ids.push_back(tokens.ids[i]);
    all_.positions.push_back(position);
    if (adapted) all_.adapters.push_back(tokens.adapters[i]);
    cache_.extend(sequence, 1);
    if (next_wanted == tokens.wanted_count || tokens.wanted[next_wanted] != i) continue;
    ++next_wanted;
    wanted_.rows.push_back(i - from);
    wanted_.ids.push_back(tokens.ids[i]);
    wanted_.positions.push_back(position);
    if (adapted) wanted_.adapters.push_back(tokens.adapters[i]);
  }
}

}  // namespace engine
