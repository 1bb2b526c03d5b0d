// The threads are torch's: two pools would each spin on the cores that the other needs. libgomp is found in
// the process rather than linked to, so that the library also loads without torch, and builds with any
// compiler.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

struct Job {
  int parts;
  void (*body)(int, int, void*);
  void* context;
};

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*number)();
  int (*team)();
};

OpenMp open_mp() {
  OpenMp found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  found.number = reinterpret_cast<decltype(found.number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  found.team = reinterpret_cast<decltype(found.team)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  return found;
}

// A forked child has none of libgomp's threads, and libgomp waits for them for ever.
std::atomic<bool> forked{false};
const int watching = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

const OpenMp& runtime() {
  static const OpenMp found = open_mp();
  return found;
}

// The team may be smaller than asked for (a thread limit, a region inside a region), so it strides.
void stride(void* argument) {
  const Job& job = *static_cast<const Job*>(argument);
  const int team = runtime().team();
  for (int part = runtime().number(); part < job.parts; part += team) job.body(part, job.parts, job.context);
}

void spawn(const Job& job) {
  std::vector<std::thread> others;
  int started = 1;
  try {
    others.reserve(job.parts);
    for (; started < job.parts; ++started)
      others.emplace_back([&job, part = started] { job.body(part, job.parts, job.context); });
  } catch (const std::exception&) {  // no more threads to be had: this one does the rest
  }
  job.body(0, job.parts, job.context);
  for (int part = started; part < job.parts; ++part) job.body(part, job.parts, job.context);
  for (auto& other : others) other.join();
}

struct Slot {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Slot() { std::free(memory); }
};

}  // namespace

void effc_parallel(int parts, void (*body)(int, int, void*), void* context) {
  Job job{parts, body, context};
  const OpenMp& omp = runtime();
  if (parts <= 1)
    body(0, 1, context);
  else if (omp.parallel && omp.number && omp.team && !forked.load())
    omp.parallel(stride, &job, static_cast<unsigned>(parts), 0);
  else
    spawn(job);
}

void* effc_scratch(int slot, size_t bytes) {
  static thread_local Slot slots[4];
  Slot& own = slots[slot];
  if (own.bytes < bytes) {
    std::free(own.memory);
    const size_t rounded = (bytes + 63) / 64 * 64;
    own.memory = std::aligned_alloc(64, rounded);
    own.bytes = own.memory ? rounded : 0;
  }
  return own.memory;
}
