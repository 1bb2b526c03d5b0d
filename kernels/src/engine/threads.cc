#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace engine {
namespace {

std::atomic<uint32_t> forks{0};
const int watching = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

constexpr int64_t kIdleSpins = 2 * Barrier::kSpins;  // between two calls, until a worker sleeps

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` does nothing on most of these processors
#else
  std::this_thread::yield();
#endif
}

}  // namespace

void Barrier::rest(int64_t waited) {
  if (waited < kSpins)
    pause();
  else
    sched_yield();
}

struct Pool::Workers {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> call{0};  // how many there were
  bool over = false;
  void (*body)(int, void*) = nullptr;
  void* context = nullptr;
  std::vector<std::thread> threads;

  // Waits for a call after `last`; false when the pool ends.
  bool next(uint64_t last) {
    for (int64_t waited = 0; waited < kIdleSpins; ++waited) {
      if (call.load(std::memory_order_acquire) != last) return !over;
      Barrier::rest(waited);
    }
    std::unique_lock<std::mutex> lock(mutex);
    wake.wait(lock, [&] { return call.load(std::memory_order_acquire) != last; });
    return !over;
  }
  void announce() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      call.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
  }
  void stop() {
    over = true;
    announce();
    for (auto& thread : threads) thread.join();
  }
};

Pool::Pool(int threads)
    : barrier(threads), threads_(threads), born_(forks.load()), workers_(std::make_unique<Workers>()) {
  Workers& all = *workers_;
  try {
    all.threads.reserve(threads - 1);
    for (int thread = 1; thread < threads; ++thread)
      all.threads.emplace_back([this, &all, thread] {
        for (uint64_t last = 0; all.next(last); ++last) {
          all.body(thread, all.context);
          barrier.meet([] { return false; });
        }
      });
  } catch (...) {
    all.stop();
    throw;
  }
}

Pool::~Pool() {
  if (alive())
    workers_->stop();
  else
    static_cast<void>(workers_.release());  // joining threads that are not there would wait for ever
}

bool Pool::alive() const { return born_ == forks.load(); }

int64_t Pool::run(void (*body)(int, void*), void* context) {
  if (threads_ == 1) return body(0, context), 0;
  workers_->body = body;
  workers_->context = context;
  workers_->announce();
  body(0, context);
  return barrier.meet([] { return false; });
}

}  // namespace engine
