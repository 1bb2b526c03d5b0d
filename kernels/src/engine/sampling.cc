// One token out of a row of logits. The filters and their order are those of transformers: repetition
// penalty, temperature, top-k, top-p; then a draw from what is left.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "../threads.h"
#include "logits.h"

EFFC_TABLE(logits_most, LogitsCall)
EFFC_TABLE(logits_weights, LogitsCall)

namespace {

struct Sampling {
  int32_t level;
  const int64_t* seen;  // tokens that the penalty is for
  int64_t seen_count;
  float temperature;    // 0: the most likely token
  int64_t top_k;        // 0: all
  float top_p, penalty;
};

struct Candidate {
  float weight;
  int64_t token;
};

// More likely first, of equals the first.
bool before(const Candidate& a, const Candidate& b) {
  return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

// A share 0 <= u < 1 of the next number of the generator splitmix64.
double draw(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void penalise(float* logits, const Sampling& own) {
  std::vector<int64_t> seen(own.seen, own.seen + own.seen_count);
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (int64_t token : seen) {
    float& logit = logits[token];
    logit = logit < 0 ? logit * own.penalty : logit / own.penalty;
  }
}

// Calls each(token) for logits that are not below `least`, in order; groups that have none are passed over.
template <class Each>
void not_below(const LogitsCall& call, float least, Each each) {
  for (int64_t from = 0; from < call.count; from += kGroup) {
    const float* most = call.most + from / kGroup * 16;
    if (std::none_of(most, most + 16, [&](float m) { return m >= least; })) continue;
    for (int64_t i = from; i < std::min(call.count, from + kGroup); ++i)
      if (call.logits[i] >= least) each(i);
  }
}

// The k-th largest logit. As many lanes have one not below the k-th largest of the lanes' largest, so only
// those from there on are looked at.
float kth_largest(const LogitsCall& call, int64_t k) {
  std::vector<float> found(call.most, call.most + (call.count + kGroup - 1) / kGroup * 16);
  const auto kth = [&] {
    std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<float>());
    return found[k - 1];
  };
  const float least = k <= static_cast<int64_t>(found.size()) ? kth() : -INFINITY;
  found.clear();
  not_below(call, least, [&](int64_t i) { found.push_back(call.logits[i]); });
  return kth();
}

double sum_of(const LogitsCall& call) {
  double all = 0;
  for (int64_t i = 0; i * kGroup < call.count; ++i) all += call.sums[i];
  return all;
}

// Where a share of the sum of all weights falls: its group first.
int64_t drawn(const LogitsCall& call, double left) {
  int64_t last = 0;
  for (int64_t i = 0; i * kGroup < call.count; ++i) {
    if (call.sums[i] > 0 && left >= call.sums[i]) {
      left -= call.sums[i];
      last = i;
      continue;
    }
    if (!(call.sums[i] > 0)) continue;
    last = i;
    break;
  }
  int64_t found = last * kGroup;
  for (int64_t i = last * kGroup; i < std::min(call.count, (last + 1) * kGroup); ++i) {
    if (!(call.weights[i] > 0)) continue;
    found = i;
    left -= call.weights[i];
    if (left < 0) break;
  }
  return found;
}

// Weights by the first bits of their float: sums of each bucket, the most likely last.
class Buckets {
 public:
  Buckets(const LogitsCall& call, float least) : call_(call), sums_(kBuckets) {
    each(least, INFINITY, [&](int64_t i) { sums_[bucket(call.weights[i])] += call.weights[i]; });
  }

  // One of the most likely that together have `most`: where `share` of their sum falls, in order.
  int64_t draw(double most, double share) const {
    double above = 0;
    int64_t last = kBuckets - 1, lowest = 0;
    while (!(sums_[lowest] > 0)) ++lowest;  // the largest weight is 1, and never too small
    for (; last > lowest && above + sums_[last] < most; --last) above += sums_[last];
    std::vector<Candidate> border = sorted(last);
    size_t kept = 0;
    double all = above;
    for (; kept < border.size() && (all < most || all == 0); ++kept) all += border[kept].weight;
    border.resize(kept);
    double left = share * all;
    for (int64_t i = kBuckets - 1; i > last; --i) {
      if (left < sums_[i]) return chosen(sorted(i), left);
      left -= sums_[i];
    }
    return chosen(border, left);
  }

 private:
  static constexpr int kShift = 18;
  static constexpr int64_t kBuckets = (0x3F800000 >> kShift) + 1;  // weights are 1 at most

  static int64_t bucket(float weight) {
    int32_t bits;
    std::memcpy(&bits, &weight, 4);
    return bits >> kShift;
  }

  static float start(int64_t bucket) {
    const auto bits = static_cast<int32_t>(bucket << kShift);
    float weight;
    std::memcpy(&weight, &bits, 4);
    return weight;
  }

  // Calls each(i) for weights from..until, without the last. Behind the last logit there are weights of 0.
  template <class Each>
  void each(float from, float until, Each each) const {
    for (int64_t i = 0; i < call_.count; i += 16) {
      int32_t any = 0;
      for (int64_t j = i; j < i + 16; ++j) any |= (call_.weights[j] >= from) & (call_.weights[j] < until);
      for (int64_t j = i; any && j < i + 16; ++j)
        if (call_.weights[j] > 0 && call_.weights[j] >= from && call_.weights[j] < until) each(j);
    }
  }

  std::vector<Candidate> sorted(int64_t bucket) const {
    std::vector<Candidate> found;
    each(start(bucket), start(bucket + 1), [&](int64_t i) { found.push_back({call_.weights[i], i}); });
    std::sort(found.begin(), found.end(), before);
    return found;
  }

  static int64_t chosen(const std::vector<Candidate>& candidates, double left) {
    for (const Candidate& one : candidates) {
      left -= one.weight;
      if (left < 0) return one.token;
    }
    return candidates.back().token;
  }

  const LogitsCall& call_;
  std::vector<double> sums_;
};

// Memory for `call`, and for logits that may be written to.
float* room(LogitsCall& call) {
  const int64_t groups = (call.count + kGroup - 1) / kGroup;
  const int64_t floats = groups * (2 * kGroup + 16);
  auto* memory = static_cast<uint8_t*>(effc_scratch(3, static_cast<size_t>(8 * groups + 64 + 4 * floats)));
  if (!memory) return nullptr;
  call.sums = reinterpret_cast<double*>(memory);
  call.most = reinterpret_cast<float*>(memory + (8 * groups + 63) / 64 * 64);
  call.weights = call.most + 16 * groups;
  return call.weights + kGroup * groups;
}

int32_t sample(const float* row, int64_t count, const Sampling& own, uint64_t& state, int64_t& token) {
  LogitsCall call{row, count, nullptr, nullptr, nullptr, 0, own.temperature};
  float* copy = room(call);
  if (!copy) return kNoMemory;
  if (own.penalty != 1.0f && own.seen_count > 0) {
    std::memcpy(copy, row, 4 * static_cast<size_t>(count));
    penalise(copy, own);
    call.logits = copy;
  }
  if (const int32_t status = logits_most_at(own.level)(call)) return status;
  const int64_t lanes = (count + kGroup - 1) / kGroup * 16;
  call.largest = *std::max_element(call.most, call.most + lanes);
  if (call.largest == -INFINITY) return kNotFinite;
  if (own.temperature == 0) {
    token = count;
    not_below(call, call.largest, [&](int64_t i) { token = std::min(token, i); });
    return kOk;
  }
  std::vector<int64_t> tokens;  // of what is left after top_k, where it is asked for
  std::vector<float> logits;
  if (own.top_k > 0 && own.top_k < count) {
    not_below(call, kth_largest(call, own.top_k), [&](int64_t i) {
      tokens.push_back(i);
      logits.push_back(call.logits[i]);
    });
    call.logits = logits.data();
    call.count = static_cast<int64_t>(logits.size());
  }
  logits_weights_at(own.level)(call);
  const double all = sum_of(call), share = draw(state);
  // What is below this can't add up to the share that falls out.
  const double least = all * (1.0 - own.top_p) / static_cast<double>(call.count) * (1 - 1e-6);
  token = own.top_p < 1 ? Buckets(call, static_cast<float>(least)).draw(all * own.top_p, share)
                        : drawn(call, share * all);
  if (!tokens.empty()) token = tokens[token];
  return kOk;
}

}  // namespace

// `state`: of the generator, goes on. kNotFinite where a logit is NaN or +inf, or none is a number.
EFFC_API int32_t effc_sample(int32_t level, const float* logits, int64_t count, const int64_t* seen,
                             int64_t seen_count, float temperature, int64_t top_k, float top_p, float penalty,
                             uint64_t* state, int64_t* token) {
  if (count < 1 || !(temperature >= 0) || !(penalty > 0) || top_k < 0 || !(top_p > 0)) return kArguments;
  if (!logits_most_at(level)) return kArguments;
  for (int64_t i = 0; i < seen_count; ++i)
    if (seen[i] < 0 || seen[i] >= count) return kArguments;
  try {
    const Sampling own{level, seen, seen_count, temperature, top_k, top_p, penalty};
    return sample(logits, count, own, *state, *token);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
