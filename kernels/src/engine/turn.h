#pragma once
#include "engine.h"

namespace engine {

// What one thread does in a level. Parts are cut for all threads, whoever does them: the sums are the same.
struct Engine::Turn {
  const Schedule& schedule;
  const Batch& batch;
  int thread, first_part, last_part;
  float* logits;
  int64_t capacity;  // rows that there is memory for
};

}  // namespace engine
