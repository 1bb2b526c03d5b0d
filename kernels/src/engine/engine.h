// A model that runs: its plan, its schedules, the cache and the threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../linear_call.h"
#include "../scan_calls.h"
#include "adapters.h"
#include "cache.h"
#include "schedule.h"
#include "states.h"
#include "steps.h"
#include "threads.h"

namespace engine {

constexpr int64_t kMirroredRows = 4;  // at most so many rows are worked on by every thread
constexpr int64_t kMirroredRoom = 8;  // of their buffers: linear kernels round the number of rows up

constexpr int64_t kBriefRows = 64;    // with more of them a wait may be long without any other work's doing

// Rows that go through the plan together, or those of them whose logits are wanted.
struct Batch {
  std::vector<int64_t> ids, positions, rows;  // rows: of the tail, which row of the whole it is
  std::vector<Run> runs;
  std::vector<int32_t> adapters;  // of the rows, -1: none; empty where no row has any
  int64_t count() const { return static_cast<int64_t>(ids.size()); }
};

struct Tokens {
  const int64_t* ids;
  const int64_t* sequences;
  int64_t count;
  const int64_t* wanted;  // increasing
  int64_t wanted_count;
  const int32_t* adapters = nullptr;  // of each token, -1: none; null: none of them has any
};

// Memory of a multiple of 64 bytes that is not set to anything.
class Room {
 public:
  bool make(int64_t bytes);
  uint8_t* at() const { return memory_.get(); }
  float* floats() const { return reinterpret_cast<float*>(memory_.get()); }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
};

// What a thread needs of its own for steps of experts: rows that meet the same one, before and after.
struct MixtureRoom {
  int64_t x = 0, y = 0, prepared = 0, picked = 0;  // bytes
  int64_t bytes() const { return x + y + 2 * prepared + picked; }
};
constexpr int64_t kMixedRows = 128;  // that meet an expert at once

// What the time of a thread goes into, in nanoseconds.
enum Spent { kInRows, kInPrepare, kInMultiply, kInMix, kInAppend, kInAttend, kInScan, kInWaiting, kSpents };

// Lines of memory that a thread will read next, fetched while it waits for the others.
struct Soon {
  const uint8_t* at;
  int64_t lines;
};

// A schedule, and what threads fetch behind each of its levels: [level * threads + thread].
struct Way {
  Schedule schedule;
  std::vector<std::vector<Soon>> soon;
};

// Whether threads share a call. Where other work holds cores, partners wait for each other longer than one
// takes to do it all: then it does, for a while that doubles each time they are found to wait again. How long is compared
// with the call, since a level of large weights takes milliseconds and no two threads are equally fast.
struct Alone {
  int64_t left = 0, next = 4;  // calls
  bool begin() { return left > 0 && left-- > 0; }
  void waited(bool long_enough) {
    next = long_enough ? std::min<int64_t>(2 * next, 16) : 4;
    left = long_enough ? next : 0;
  }
};

class Engine {
 public:
  // `plan` and what it points to is copied, the weights are not. Throws what memory and threads throw.
  explicit Engine(const Plan& plan);
  int32_t run(const Tokens& tokens, float* logits);
  int32_t encode(const Tokens& tokens);  // sources, whole, of sequences that have none yet
  int32_t forget(int64_t sequence, int64_t length);  // 0 tokens: its source too
  int32_t add_adapter(const LowRank* updates, int32_t count, int32_t& number);
  int32_t remove_adapter(int32_t number);
  int64_t length(int64_t sequence) const { return cache_.length(sequence); }
  int64_t source(int64_t sequence) const { return encoder_ ? encoder_->length(sequence) : 0; }
  int64_t sequences() const { return cache_.sequences(); }
  void cancel() {
    cancelled_.store(true);
    if (encoder_) encoder_->cancel();
  }
  // Sums of all threads since the last call of this, which also says whether to go on measuring.
  void profile(int64_t (&spent)[kSpents], bool on);

 private:
  struct Job;
  struct Turn;
  void reserve();
  void reserve_rows(const Way* ways, int32_t count);
  void turn_rates();
  bool reserve_mixtures();
  int32_t check(const Tokens& tokens) const;
  int32_t all_chunks(const Tokens& tokens, float* logits);
  int64_t chunk_end(const Tokens& tokens, int64_t from) const;
  void load(const Tokens& tokens, int64_t from, int64_t until, int64_t& next_wanted);
  static void work(int thread, void* context);
  float* buffer(const Turn& turn, int32_t number) const;
  float* reg(const Turn& turn, int32_t number, int64_t& stride) const;
  void look_ahead(Way& way) const;
  void level(const Turn& turn, int32_t number, int64_t* spent) const;
  void rows(const Turn& turn, const Task* begin, const Task* end) const;
  void rows(const Turn& turn, const Step& step, int64_t from, int64_t until) const;
  void linear(const Turn& turn, const Task& task) const;
  // Rows of a lot, and which part of their outputs one thread computes.
  struct LotPart {
    int64_t begin, end;
    int32_t part, parts;
  };
  void linear(const Turn& turn, const Task& task, int64_t lot, int64_t count) const;
  void linear(const Turn& turn, const Task& task, int64_t lot, const LotPart& own) const;
  Epilogue epilogue(const Turn& turn, const Fused& fused, int64_t from) const;
  void attention(const Turn& turn, const Task& task) const;
  bool has_adapter(int32_t number) const {
    return number >= 0 && number < static_cast<int32_t>(adapters_.size()) && adapters_[number];
  }
  void update(const Turn& turn, int32_t step, LowRankCall call, int64_t from, int64_t until) const;
  void update_product(const Turn& turn, const LinearPart& part, int32_t step, int64_t from) const;
  void update_written(const Turn& turn, const RowsCall& rows) const;
  RowsCall rows_call(const Turn& turn, const Step& step) const;
  void mix(const Turn& turn, const Step& step) const;
  void experts(const Turn& turn, const Step& step) const;
  void scan(const Turn& turn, const Step& step) const;
  void convolve(const Turn& turn, const Step& step, const Run& run, int part) const;
  void ssd(const Turn& turn, const Step& step, const Run& run, int part) const;
  void selective(const Turn& turn, const Step& step, const Run& run, int part) const;
  void delta(const Turn& turn, const Step& step, const Run& run, int part) const;
  Rows rows_of(const Turn& turn, int32_t number, const Run& run) const;
  const float* vector(int32_t weight) const;
  void embed(const Turn& turn, const Step& step) const;
  void carry(const Turn& turn) const;

  std::vector<Step> steps_;
  std::vector<int32_t> widths_;
  std::vector<Weight> weights_;
  std::vector<Slot> slots_;
  Plan plan_;
  Way plain_[2], adapted_[2];  // of few rows, which are mirrored, and of many; adapted ones once there is an adapter
  std::vector<std::unique_ptr<Adapter>> adapters_;  // null: a number that is free
  std::vector<std::vector<int64_t>> bounds_;  // of each packed weight: the blocks of each thread
  std::vector<std::vector<uint8_t*>> rooms_;  // of each slot: the cache of each sequence
  Cache cache_;
  States states_;
  std::vector<std::vector<float>> rates_;  // of each state: A, if a selective scan has it
  bool whole_ = false;  // some attention sees a text whole, or it encodes: each comes at once and alone
  std::unique_ptr<Engine> encoder_;
  int64_t chunk_;
  Room shared_, own_, panels_, pieces_, mixed_;
  int64_t shared_bytes_ = 0, own_bytes_ = 0;
  MixtureRoom mixture_;
  std::vector<Pieces::Count> counts_;
  int32_t (*rows_at_)(const RowsCall&);
  int32_t (*act_at_)(const ActCall&);
  int32_t (*low_rank_at_)(const LowRankCall&);
  int32_t (*attend_at_)(const AttendCall&);
  int32_t (*linear_at_[kKinds])(const LinearPart&);
  int32_t (*convolve_at_)(const CausalConvCall&);
  int32_t (*ssd_at_)(const SsdScanCall&);
  int32_t (*selective_at_)(const SelectiveScanCall&);
  int32_t (*delta_at_)(const DeltaRuleCall&);
  std::unique_ptr<Pool> pool_;
  Batch all_, wanted_;
  std::atomic<bool> busy_{false}, cancelled_{false};
  bool profiled_ = false;
  std::vector<int64_t> spent_;  // [threads][kSpents]
  Alone alone_;
};

}  // namespace engine
