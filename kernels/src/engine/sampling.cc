// One token out of a row of logits. The filters and their order are those of transformers: repetition
// penalty, temperature, top-k, top-p; then a draw from what is left.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "../exponentials.h"
#include "../levels.h"

namespace {

struct Sampling {
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

// A share 0 <= u < 1 of the next number of the generator splitmix64.
double draw(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void penalise(std::vector<float>& logits, const Sampling& own) {
  if (own.penalty == 1.0f) return;
  std::vector<int64_t> seen(own.seen, own.seen + own.seen_count);
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (int64_t token : seen) {
    float& logit = logits[token];
    logit = logit < 0 ? logit * own.penalty : logit / own.penalty;
  }
}

// Logits below the k-th largest are out; its equals stay.
void keep_top(std::vector<float>& logits, int64_t k) {
  if (k < 1 || k >= static_cast<int64_t>(logits.size())) return;
  std::vector<float> sorted(logits);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
  const float least = sorted[k - 1];
  for (float& logit : logits)
    if (logit < least) logit = -INFINITY;
}

// exp((logit - largest) / temperature), 0 where that is below e^-80.
std::vector<float> weights(const std::vector<float>& logits, float largest, float temperature) {
  const size_t count = logits.size();
  std::vector<float> found((count + 15) / 16 * 16, -INFINITY);
  for (size_t i = 0; i < count; ++i) found[i] = (logits[i] - largest) / temperature;
  for (size_t i = 0; i < found.size(); i += 16) {
    float own[16];
    store(own, exponentials(load_floats(found.data() + i)));
    for (int j = 0; j < 16; ++j) found[i + j] = found[i + j] < -80.0f ? 0.0f : own[j];
  }
  return found;
}

// The most likely tokens that together have top_p of all, least likely first out.
std::vector<Candidate> nucleus(const std::vector<float>& found, float top_p) {
  double all = 0;
  for (float weight : found) all += weight;
  // What is below this can't add up to the share that falls out.
  const double least = top_p < 1 ? all * (1.0 - top_p) / static_cast<double>(found.size()) : 0;
  std::vector<Candidate> kept;
  for (size_t i = 0; i < found.size(); ++i)
    if (found[i] > 0 && found[i] >= least) kept.push_back({found[i], static_cast<int64_t>(i)});
  if (top_p >= 1) return kept;
  std::stable_sort(kept.begin(), kept.end(),
                   [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; });
  double before = 0;
  size_t count = 0;
  for (; count < kept.size() && (count == 0 || before < all * top_p); ++count) before += kept[count].weight;
  kept.resize(count);
  return kept;
}

int32_t sample(const float* row, int64_t count, const Sampling& own, uint64_t& state, int64_t& token) {
  std::vector<float> logits(row, row + count);
  for (int64_t i = 0; i < count; ++i)
    if (logits[i] != logits[i] || logits[i] == INFINITY) return kNotFinite;
  penalise(logits, own);
  const auto most = std::max_element(logits.begin(), logits.end());
  if (*most == -INFINITY) return kNotFinite;
  token = most - logits.begin();
  if (own.temperature == 0) return kOk;
  const float largest = *most;
  keep_top(logits, own.top_k);
  const std::vector<Candidate> kept = nucleus(weights(logits, largest, own.temperature), own.top_p);
  double all = 0;
  for (const Candidate& one : kept) all += one.weight;
  double left = draw(state) * all;
  for (const Candidate& one : kept) {
    token = one.token;
    left -= one.weight;
    if (left < 0) break;
  }
  return kOk;
}

}  // namespace

// `state`: of the generator, goes on. kNotFinite where a logit is NaN or +inf, or none is a number.
EFFC_API int32_t effc_sample(const float* logits, int64_t count, const int64_t* seen, int64_t seen_count,
                             float temperature, int64_t top_k, float top_p, float penalty, uint64_t* state,
                             int64_t* token) {
  if (count < 1 || !(temperature >= 0) || !(penalty > 0) || top_k < 0 || !(top_p > 0)) return kArguments;
  for (int64_t i = 0; i < seen_count; ++i)
    if (seen[i] < 0 || seen[i] >= count) return kArguments;
  try {
    return sample(logits, count, {seen, seen_count, temperature, top_k, top_p, penalty}, *state, *token);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
