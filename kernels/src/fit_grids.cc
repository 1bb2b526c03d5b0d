// Scales of groups of weights whose rounding to a grid of few values has the least squared error.
//
// Of shrinking ranges of a group the grid is tried that covers each; `Grid` in grid.py says what a grid is. Sixteen groups
// lie side by side, so that a vector holds as many.
#include "scan.h"

struct FitGridsCall {
  const float* weights;  // [count, width]
  const float* worth;    // [period, width]: what a squared error counts in the groups period * n + row; null: as one
  const float* shares;   // [steps]: ranges that are tried, as shares of the whole one
  float *scale, *zero;   // [count]
  int64_t count, width, period, steps;
  float most;            // the largest code; the least is 0
  int32_t symmetric, threads;
};

namespace {

constexpr int kGroups = 16;  // side by side
constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to nearest even

// The least bfloat16 number that is not below a positive float32 one.
inline float no_less(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0xffffu) & ~0xffffu;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Sixteen {
  const FitGridsCall& call;

  int32_t operator()(int64_t index) const {
    const int64_t first = index * kGroups, lanes = std::min<int64_t>(kGroups, call.count - first);
    const int64_t numbers = kGroups * call.width;
    auto* weights = static_cast<float*>(effc_scratch(0, 8 * numbers));  // [width][kGroups]
    if (!weights) return kNoMemory;
    float *worth = call.worth ? weights + numbers : nullptr, low[kGroups] = {}, high[kGroups] = {};
    for (int64_t lane = 0; lane < kGroups; ++lane) {
      const int64_t group = first + std::min(lane, lanes - 1);
      const float* row = call.weights + group * call.width;
      for (int64_t i = 0; i < call.width; ++i) {
        weights[i * kGroups + lane] = row[i];
        low[lane] = std::min(low[lane], row[i]);
        high[lane] = std::max(high[lane], row[i]);
        if (worth) worth[i * kGroups + lane] = call.worth[group % call.period * call.width + i];
      }
    }
    float least[kGroups], best_scale[kGroups], best_zero[kGroups];
    std::fill(least, least + kGroups, INFINITY);
    for (int64_t step = 0; step < call.steps; ++step) {
      float scale[kGroups], zero[kGroups], error[kGroups] = {};
      for (int lane = 0; lane < kGroups; ++lane)
        cover(low[lane] * call.shares[step], high[lane] * call.shares[step], scale[lane], zero[lane]);
      add_errors(weights, worth, scale, zero, error);
      for (int lane = 0; lane < kGroups; ++lane)
        if (step == 0 || error[lane] < least[lane])
          least[lane] = error[lane], best_scale[lane] = scale[lane], best_zero[lane] = zero[lane];
    }
    std::copy(best_scale, best_scale + lanes, call.scale + first);
    std::copy(best_zero, best_zero + lanes, call.zero + first);
    return kOk;
  }

  void cover(float low, float high, float& scale, float& zero) const {
    if (call.symmetric) high = std::max(-low, high), low = -high;
    if (low == high) low = -1.0f, high = 1.0f;
    scale = no_less((high - low) / call.most);
    zero = call.symmetric ? (call.most + 1.0f) / 2.0f : (-low / scale + kRound) - kRound;
  }

  void add_errors(const float* weights, const float* worth, const float* scale, const float* zero, float* error) const {
    const Floats steps = load_floats(scale), lowest = times(load_floats(zero), all(-1.0f));
    const Floats negated_highest = times(plus(all(call.most), lowest), all(-1.0f));
    Floats sum = no_floats();
    for (int64_t i = 0; i < call.width; ++i) {
      const Floats weight = load_floats(weights + i * kGroups);
      const Floats code = plus(plus(over(weight, steps), all(kRound)), all(-kRound));
      const Floats negated = greater(times(greater(code, lowest), all(-1.0f)), negated_highest);
      const Floats off = plus(times(negated, steps), weight);
      const Floats square = times(off, off);
      sum = plus(sum, worth ? times(square, load_floats(worth + i * kGroups)) : square);
    }
    store(error, sum);
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(fit_grids)(const FitGridsCall& call) {
  const Sixteen sixteen{call};
  return share((call.count + kGroups - 1) / kGroups, call.threads, sixteen);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(fit_grids, FitGridsCall)

EFFC_API int32_t effc_fit_grids(int32_t level, const float* weights, const float* worth, const float* shares, float* scale,
                                float* zero, int64_t count, int64_t width, int64_t period, int64_t steps, float most,
                                int32_t symmetric, int32_t threads) {
  const auto body = fit_grids_at(level);
  if (!body || count < 1 || width < 1 || period < 1 || steps < 1 || !(most >= 1)) return kArguments;
  return body(FitGridsCall{weights, worth, shares, scale, zero, count, width, period, steps, most, symmetric, threads});
}
#endif
