#include "states.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace engine {
namespace {

constexpr double kMostBytes = 1e14;  // no processor addresses as much

// Channels, heads and states are filled up to what vectors and registers hold.
int64_t size(const Step& step, int64_t width) {
  if (step.op == kConvolve) return (step.count - 1) * width;
  if (step.op == kSelective) return ceil_to(width, 16) * step.states;
  if (step.op == kDelta) return static_cast<int64_t>(step.heads) * step.head_dim * step.value_dim;
  return step.heads * ceil_to(step.head_dim, 16) * ceil_to(step.states, 4);
}

}  // namespace

States::~States() {
  if (memory_) munmap(memory_, static_cast<size_t>(bytes_));
}

bool States::reserve(const Plan& plan) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  side_.assign(plan.sequences, 0);
  moved_.assign(plan.sequences, 0);
  for (int32_t i = 0; i < plan.step_count; ++i) {
    if (!has_state(plan.steps[i])) continue;
    starts_.push_back(floats_);
    floats_ += ceil_to(size(plan.steps[i], plan.widths[plan.steps[i].to]), 16);
  }
  if (!any()) return true;
  floats_ = ceil_to(4 * floats_, page) / 4;
  if (8.0 * floats_ * plan.sequences > kMostBytes) return false;
  bytes_ = 8 * floats_ * plan.sequences;
  void* found = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  memory_ = found == MAP_FAILED ? nullptr : static_cast<float*>(found);
  return memory_ != nullptr;
}

bool States::move_on(int64_t sequence) {
  const bool moved = moved_[sequence];
  moved_[sequence] = any();
  return moved;
}

void States::settle(bool succeeded) {
  for (size_t i = 0; i < side_.size(); ++i) {
    if (succeeded) side_[i] ^= moved_[i];
    moved_[i] = 0;
  }
}

void States::forget(int64_t sequence) {
  if (!any()) return;
  float* both = memory_ + 2 * sequence * floats_;
  if (madvise(both, static_cast<size_t>(8 * floats_), MADV_DONTNEED) != 0)
    std::memset(both, 0, static_cast<size_t>(8 * floats_));
}

}  // namespace engine
