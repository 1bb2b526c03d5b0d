#include "logits.h"

#include <algorithm>
#include <cmath>

#include "../exponentials.h"

namespace {

// A group of logits, -inf behind the last.
const float* group(const LogitsCall& call, int64_t number, float (&rest)[kGroup]) {
  const float* from = call.logits + number * kGroup;
  const int64_t left = call.count - number * kGroup;
  if (left >= kGroup) return from;
  std::fill(rest, rest + kGroup, -INFINITY);
  std::copy(from, from + left, rest);
  return rest;
}

}  // namespace

// kNotFinite where a logit is NaN or +inf.
int32_t EFFC_AT_LEVEL(logits_most)(const LogitsCall& call) {
  float rest[kGroup];
  int32_t odd = 0;
  for (int64_t i = 0; i * kGroup < call.count; ++i) {
    const float* x = group(call, i, rest);
    float most[16];
    std::copy(x, x + 16, most);
    for (int64_t j = 0; j < kGroup; j += 16)
      for (int lane = 0; lane < 16; ++lane) {
        odd |= !(x[j + lane] < INFINITY);
        most[lane] = x[j + lane] > most[lane] ? x[j + lane] : most[lane];
      }
    std::copy(most, most + 16, call.most + 16 * i);
  }
  return odd ? kNotFinite : kOk;
}

int32_t EFFC_AT_LEVEL(logits_weights)(const LogitsCall& call) {
  float rest[kGroup];
  for (int64_t i = 0; i * kGroup < call.count; ++i) {
    const float* x = group(call, i, rest);
    float* to = call.weights + i * kGroup;
    double sums[16] = {};
    for (int64_t j = 0; j < kGroup; j += 16) {
      float near[16], own[16];
      for (int lane = 0; lane < 16; ++lane) near[lane] = (x[j + lane] - call.largest) / call.temperature;
      store(own, exponentials(load_floats(near)));
      for (int lane = 0; lane < 16; ++lane) to[j + lane] = near[lane] < -80.0f ? 0.0f : own[lane];
      for (int lane = 0; lane < 16; ++lane) sums[lane] += to[j + lane];
    }
    call.sums[i] = 0;
    for (double sum : sums) call.sums[i] += sum;
  }
  return kOk;
}
