// What `schedules.py` asks of the engine's own sources: its schedule, its shares and its barrier. That script builds it.
#include <atomic>
#include <chrono>
#include <cstdint>

#include "../kernels/src/engine/schedule.h"
#include "../kernels/src/engine/threads.h"
#include "../kernels/src/share.h"

namespace {

struct Job {
  engine::Pool pool{2};
  int64_t times;
  alignas(64) std::atomic<int64_t> line{0};
  void (*body)(int thread, Job& job);
};

// Of each of so many times that two threads do it.
double seconds_of_two(int64_t times, void (*body)(int, Job&)) {
  Job job;
  job.times = times;
  job.body = body;
  const auto begun = std::chrono::steady_clock::now();
  job.pool.run([](int thread, void* context) {
    Job& own = *static_cast<Job*>(context);
    own.body(thread, own);
  }, &job);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count() / times;
}

}  // namespace

extern "C" {

// Work, step and level of the tasks of a schedule, in order, and whether only rows whose logits are wanted have it; how
// many there are.
int64_t schedule_tasks(const Plan* plan, int32_t mirrored, int64_t most, int32_t (*tasks)[4]) {
  const engine::Schedule schedule(*plan, mirrored);
  int64_t count = 0;
  for (size_t level = 0; level < schedule.levels.size(); ++level)
    for (const engine::Task& task : schedule.levels[level]) {
      const auto number = static_cast<int32_t>(level);
      if (count < most) {
        int32_t* const into = tasks[count];
        into[0] = static_cast<int32_t>(task.work), into[1] = task.step, into[2] = number;
        into[3] = number >= schedule.tail;
      }
      ++count;
    }
  return count;
}

// Bytes of a packed weight that each of so many threads reads.
void share_bytes(const uint8_t* weight, int32_t parts, int64_t* bytes) {
  const Packed packed(weight);
  for (int part = 0; part < parts; ++part) {
    const Share share(packed, part, parts);
    bytes[part] = packed.offset(share.to) - packed.offset(share.from);
  }
}

// Seconds of one meeting of two threads that have nothing to do between two.
double barrier_seconds(int64_t meetings) {
  return seconds_of_two(meetings, [](int, Job& job) {
    for (int64_t i = 0; i < job.times; ++i) job.pool.barrier.meet([] { return false; });
  });
}

// Seconds in which a line of memory that one of two threads wrote reaches the other.
double line_seconds(int64_t passes) {
  return seconds_of_two(passes, [](int thread, Job& job) {
    for (int64_t i = thread; i < job.times; i += 2) {
      while (job.line.load(std::memory_order_acquire) != i) {}
      job.line.store(i + 1, std::memory_order_release);
    }
  });
}

}
