// The engine's own threads. They stay, since a token of a small model takes less time than starting a few
// hundred parallel regions, and they meet at barriers that first spin and then let others have the core.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

namespace engine {

inline int64_t nanoseconds() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// Where all threads of a pool wait for each other.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), missing_(threads) {}
  // Calls `meanwhile` while others are missing, until it returns false, and rests from then on. Nanoseconds for which
  // the thread still waited when it had looked for them `kSpins` times.
  template <class Meanwhile>
  int64_t meet(Meanwhile meanwhile) {
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      missing_.store(threads_, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return 0;
    }
    bool more = true;
    int64_t long_since = 0;
    for (int64_t waited = 0; turn_.load(std::memory_order_acquire) == turn; ++waited) {
      if (waited == kSpins) long_since = nanoseconds();
      more = more && waited < kSpins && meanwhile();
      if (!more) rest(waited);
    }
    return long_since ? nanoseconds() - long_since : 0;
  }
  // What a thread does that has waited so often already. A partner that lost its core gets it back sooner
  // when those who wait for it give theirs up.
  static void rest(int64_t waited);
  static constexpr int64_t kSpins = 2000;  // about 30 us: longer than a step takes that is shared out well

 private:
  const int threads_;
  alignas(64) std::atomic<int> missing_;
  alignas(64) std::atomic<uint32_t> turn_{0};
};

class Pool {
 public:
  explicit Pool(int threads);  // throws what std::thread throws
  ~Pool();
  Pool(const Pool&) = delete;
  // Calls body(thread, context) in every thread; the calling one is number 0. One call at a time. How long that one
  // waited for the others in the end, as `Barrier::meet` says.
  int64_t run(void (*body)(int thread, void* context), void* context);
  // False in a child that the process forked: its threads stayed behind, and it can't even be destroyed.
  bool alive() const;
  int threads() const { return threads_; }
  Barrier barrier;

 private:
  struct Workers;
  const int threads_;
  const uint32_t born_;
  std::unique_ptr<Workers> workers_;
};

}  // namespace engine
