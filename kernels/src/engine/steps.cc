// The steps that work row by row, at the level of this compilation.
#include "steps.h"

#include <algorithm>
#include <cmath>

#include "../exponentials.h"

namespace {

using engine::RowsCall;

const float* floats(const RowsCall& call, int32_t weight) {
  return weight < 0 ? nullptr : reinterpret_cast<const float*>(call.weights[weight].at);
}

// Runs `body` on 16 numbers at a time; the last ones go through memory of their own.
template <class Body>
void each(const float* x, float* to, int64_t count, Body body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) body(x + i, to + i);
  if (i == count) return;
  float rest[16] = {};
  std::copy(x + i, x + count, rest);
  body(rest, rest);
  std::copy(rest, rest + (count - i), to + i);
}

// exp(-|x|) and 1 over one more than it.
struct Logistic {
  float e[16], inverse[16];
  explicit Logistic(const float* x, float times) {
    for (int i = 0; i < 16; ++i) e[i] = -std::fabs(x[i] * times);
    store(e, exponentials(load_floats(e)));
    for (int i = 0; i < 16; ++i) inverse[i] = 1.0f / (1.0f + e[i]);
  }
  float sigmoid(int i, float x) const { return x < 0 ? e[i] * inverse[i] : inverse[i]; }
};

// x * sigmoid(times * x)
void swish(const float* x, float* to, float times) {
  const Logistic logistic(x, times);
  for (int i = 0; i < 16; ++i) to[i] = x[i] * logistic.sigmoid(i, x[i]);
}

// tanh to 1e-7 of 1: with e = exp(-2|x|) it is (1 - e) / (1 + e), signed as x.
void hyperbolic(const float* x, float* to) {
  const Logistic logistic(x, 2.0f);
  for (int i = 0; i < 16; ++i) to[i] = std::copysign((1.0f - logistic.e[i]) * logistic.inverse[i], x[i]);
}

void gelu_tanh(const float* x, float* to) {
  float inner[16];
  for (int i = 0; i < 16; ++i) inner[i] = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
  hyperbolic(inner, inner);
  for (int i = 0; i < 16; ++i) to[i] = 0.5f * x[i] * (1.0f + inner[i]);
}

// x times the normal distribution function. erf by Abramowitz and Stegun 7.1.26, to 1.5e-7.
void gelu(const float* x, float* to) {
  float e[16];
  for (int i = 0; i < 16; ++i) e[i] = -0.5f * x[i] * x[i];
  store(e, exponentials(load_floats(e)));
  for (int i = 0; i < 16; ++i) {
    const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x[i]));
    float sum = 1.061405429f;
    for (float next : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = sum * t + next;
    sum *= t;
    const float half = 0.5f * sum * e[i];  // of what lies outside -|x|..|x|
    to[i] = x[i] * (x[i] < 0 ? half : 1.0f - half);
  }
}

// log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)).
void softplus(const float* x, float* to) {
  const Logistic logistic(x, 1.0f);
  for (int i = 0; i < 16; ++i) to[i] = std::max(x[i], 0.0f) + std::log1p(logistic.e[i]);
}

// A square above zero and exp(x) - 1 - x below, each by a number of its own, and a share of x.
void xielu(const Step& step, const float* x, float* to) {
  for (int i = 0; i < 16; ++i) {
    const float bent = x[i] > 0 ? step.most * x[i] * x[i] : step.scale * (std::expm1(x[i]) - x[i]);
    to[i] = bent + step.number * x[i];
  }
}

void powers(int32_t kind, const float* x, float* to) {
  for (int i = 0; i < 16; ++i) {
    if (kind == kSquare) to[i] = x[i] * x[i];
    if (kind == kSqrt) to[i] = std::sqrt(x[i]);
    if (kind == kReciprocal) to[i] = 1.0f / x[i];
    if (kind == kExp) to[i] = std::exp(x[i]);
  }
}

void act(int32_t kind, const float* x, float* to) {
  if (kind == kSoftplus) return softplus(x, to);
  if (kind == kSilu) return swish(x, to, 1.0f);
  if (kind == kQuickGelu) return swish(x, to, 1.702f);
  if (kind == kGelu) return gelu(x, to);
  if (kind == kGeluTanh) return gelu_tanh(x, to);
  if (kind == kTanh) return hyperbolic(x, to);
  if (kind == kSigmoid) {
    const Logistic logistic(x, 1.0f);
    for (int i = 0; i < 16; ++i) to[i] = logistic.sigmoid(i, x[i]);
    return;
  }
  if (kind >= kSquare) return powers(kind, x, to);
  for (int i = 0; i < 16; ++i) {
    const float kept = x[i] < 0 ? 0.0f : x[i];
    to[i] = kind == kRelu2 ? kept * kept : kept;
  }
}

// The sum of (x - middle)^power, in 16 chains.
template <int Power>
float sum(const float* x, int64_t count, float middle) {
  float chains[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int c = 0; c < 16; ++c) {
      const float near = x[i + c] - middle;
      chains[c] += Power == 2 ? near * near : near;
    }
  for (int c = 0; i < count; ++i, ++c) {
    const float near = x[i] - middle;
    chains[c] += Power == 2 ? near * near : near;
  }
  return total(load_floats(chains));
}

void norm(const RowsCall& call, const float* x, float* to) {
  const Step& step = *call.step;
  const float *weight = floats(call, step.weight), *bias = floats(call, step.bias);
  const int64_t group = step.group;
  const bool whole_weight = weight && call.weights[step.weight].k == call.width;
  const bool whole_bias = bias && call.weights[step.bias].k == call.width;
  for (int64_t at = 0; at < call.width; at += group) {
    const float middle = step.kind == kLayer ? sum<1>(x + at, group, 0.0f) / group : 0.0f;
    const float inverse = 1.0f / std::sqrt(sum<2>(x + at, group, middle) / group + step.number);
    for (int64_t i = 0; i < group; ++i) to[at + i] = (x[at + i] - middle) * inverse;
    const float *w = weight + (whole_weight ? at : 0), *b = bias + (whole_bias ? at : 0);
    if (weight)
      for (int64_t i = 0; i < group; ++i) to[at + i] *= w[i];
    if (bias)
      for (int64_t i = 0; i < group; ++i) to[at + i] += b[i];
  }
}

void mean(const RowsCall& call, const float* x, float* to) {
  const int64_t group = call.step->group;
  for (int64_t i = 0; i < call.width; ++i) to[i] = sum<1>(x + i * group, group, 0.0f) / group;
}

// Cosines of all angles of a position, then their sines.
void angles(const RowsCall& call, int64_t position, float* to) {
  const float* frequencies = floats(call, call.step->weight);
  const int64_t half = call.width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * frequencies[i];
    to[i] = std::cos(angle) * call.step->scale;
    to[half + i] = std::sin(angle) * call.step->scale;
  }
}

void rotary(const RowsCall& call, const float* x, const float* cosines, float* to) {
  const Step& step = *call.step;
  const int64_t half = step.rotary_dim / 2;
  const float* sines = cosines + half;
  for (int64_t head = 0; head < step.heads; ++head, x += step.head_dim, to += step.head_dim) {
    std::copy(x, x + step.start, to);
    std::copy(x + step.start + 2 * half, x + step.head_dim, to + step.start + 2 * half);
    const float* from = x + step.start;
    float* into = to + step.start;
    if (step.interleaved)
      for (int64_t i = 0; i < half; ++i) {
        const float a = from[2 * i], b = from[2 * i + 1];
        into[2 * i] = a * cosines[i] - b * sines[i];
        into[2 * i + 1] = b * cosines[i] + a * sines[i];
      }
    else
      for (int64_t i = 0; i < half; ++i) {
        const float a = from[i], b = from[half + i];
        into[i] = a * cosines[i] - b * sines[i];
        into[half + i] = b * cosines[i] + a * sines[i];
      }
  }
}

void look_up(const RowsCall& call, int64_t row, float* to) {
  const Weight& table = call.weights[call.step->weight];
  if (table.form == kFloat32) {
    const float* from = reinterpret_cast<const float*>(table.at) + row * table.k;
    std::copy(from, from + table.k, to);
    return;
  }
  const uint16_t* from = reinterpret_cast<const uint16_t*>(table.at) + row * table.k;
  for (int64_t i = 0; i < table.k; ++i) to[i] = from_bf16(from[i]);
}

void pick(const RowsCall& call, const float* x, float* to) {
  const Step& step = *call.step;
  for (int64_t i = 0; i < step.count; ++i) {
    const float* from = x + step.start + i * step.stride;
    std::copy(from, from + step.block, to + i * step.block);
  }
}

// Products of a row with those of a float32 matrix: what a router compares would change with less.
void scores(const RowsCall& call, const float* x, float* to) {
  const float *matrix = floats(call, call.step->weight), *bias = floats(call, call.step->bias);
  for (int64_t n = call.first; n < call.last; ++n) {
    const float* w = matrix + n * call.x_width;
    float chains[16] = {};
    int64_t i = 0;
    for (; i + 16 <= call.x_width; i += 16)
      for (int c = 0; c < 16; ++c) chains[c] += x[i + c] * w[i + c];
    for (int c = 0; i < call.x_width; ++i, ++c) chains[c] += x[i] * w[i];
    to[n] = total(load_floats(chains)) + (bias ? bias[n] : 0.0f);
  }
}

constexpr int64_t kMostExperts = 4096;

// exp(x - the largest) over their sum, or the logistic function of each. `to` has room for whole vectors.
void shares(int32_t kind, const float* x, int64_t count, float* to) {
  const int64_t whole = (count + 15) / 16 * 16;
  std::copy(x, x + count, to);
  std::fill(to + count, to + whole, -INFINITY);
  if (kind != kSoftmax) {
    for (int64_t i = 0; i < whole; i += 16) {
      const Logistic logistic(to + i, 1.0f);
      for (int c = 0; c < 16; ++c) to[i + c] = logistic.sigmoid(c, to[i + c]);
    }
    return;
  }
  const float most = *std::max_element(x, x + count);
  for (int64_t i = 0; i < whole; i += 16) store(to + i, exponentials(plus(load_floats(to + i), all(-most))));
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += to[i];
  for (int64_t i = 0; i < count; ++i) to[i] /= sum;
}

// The place of the largest that is not taken yet; of equal ones, and where none compares, the first.
int64_t best(const float* x, int64_t count, const bool* taken) {
  int64_t found = -1;
  for (int64_t i = 0; i < count; ++i)
    if (!taken[i] && (found < 0 || x[i] > x[found])) found = i;
  return found;
}

// Marks the experts of all groups but those whose best ones sum to the most.
void leave_groups(const Step& step, const float* choice, int64_t count, bool* taken) {
  const int64_t groups = step.group, each = count / groups;
  float sums[kMostExperts];
  bool kept[kMostExperts] = {};
  for (int64_t g = 0; g < groups; ++g) {
    sums[g] = 0;
    for (int64_t n = 0; n < step.stride; ++n) {
      const int64_t next = best(choice + g * each, each, taken + g * each);
      sums[g] += choice[g * each + next];
      taken[g * each + next] = true;
    }
  }
  for (int64_t n = 0; n < step.block; ++n) kept[best(sums, groups, kept)] = true;
  for (int64_t i = 0; i < count; ++i) taken[i] = !kept[i / each];
}

// One expert after another: of those that are left the largest, and its share among all that are near it.
void route_near(const Step& step, const float* x, int64_t experts, float* to) {
  bool taken[kMostExperts] = {};
  for (int64_t n = 0; n < step.count; ++n) {
    const int64_t next = best(x, experts, taken);
    float sum = 0;
    for (int64_t i = 0; i < experts; ++i) {
      const bool far = (x[next] - x[i]) / std::max(std::fabs(x[i]), x[next]) > step.number;
      if (!taken[i] && !far) sum += std::exp(x[i] - x[next]);
    }
    taken[next] = true;
    to[n] = step.scale / sum;
    to[step.count + n] = static_cast<float>(next);
  }
}

// The experts of a token: `count` weights, then as many numbers of experts.
void route(const RowsCall& call, const float* x, float* to) {
  const Step& step = *call.step;
  if (step.kind == kNear) return route_near(step, x, call.x_width, to);
  const float* bias = floats(call, step.weight);
  float share[kMostExperts + 16], choice[kMostExperts];
  bool taken[kMostExperts] = {};
  const int64_t experts = call.x_width;
  shares(step.kind, x, experts, share);
  for (int64_t i = 0; i < experts; ++i) choice[i] = (step.kind == kLogits ? x[i] : share[i]) + (bias ? bias[i] : 0.0f);
  if (step.group > 1) leave_groups(step, choice, experts, taken);
  float sum = step.number;
  for (int64_t n = 0; n < step.count; ++n) {
    const int64_t next = best(choice, experts, taken);
    taken[next] = true;
    to[n] = share[next];
    to[step.count + n] = static_cast<float>(next);
    sum += share[next];
  }
  for (int64_t n = 0; n < step.count; ++n) to[n] = to[n] / (step.interleaved ? sum : 1.0f) * step.scale;
}

void pointwise(const RowsCall& call, const float* x, const float* y, float* to) {
  const Step& step = *call.step;
  const int64_t width = call.width;
  const float number = step.number, *vector = floats(call, step.weight);
  if (step.op == kAddVector || step.op == kMulVector) y = vector;
  switch (step.op) {
    case kAct:
      each(x, to, width, [&](const float* from, float* into) { act(step.kind, from, into); });
      break;
    case kXielu:
      each(x, to, width, [&](const float* from, float* into) { xielu(step, from, into); });
      break;
    case kSoftcap:
      each(x, to, width, [&](const float* from, float* into) {
        float inner[16];
        for (int i = 0; i < 16; ++i) inner[i] = from[i] / number;
        hyperbolic(inner, inner);
        for (int i = 0; i < 16; ++i) into[i] = number * inner[i];
      });
      break;
    case kClip:
      for (int64_t i = 0; i < width; ++i) to[i] = std::min(std::max(x[i], number), step.most);
      break;
    case kAdd:
    case kAddVector:
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] + y[i];
      break;
    case kMul:
    case kMulVector:
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] * y[i];
      break;
    case kScale:
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] * number;
      break;
    default:
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] + number;
  }
}

}  // namespace

int32_t EFFC_AT_LEVEL(engine_act)(const ActCall& call) {
  for (float* at = call.values; at < call.values + call.count; at += 16) {
    float x[16];  // apart from what is written, or compilers leave vectors aside
    std::copy(at, at + 16, x);
    act(call.kind, x, at);
  }
  return kOk;
}

int32_t EFFC_AT_LEVEL(engine_rows)(const EngineRows& call) {
  const Step& step = *call.step;
  for (int64_t row = call.from; row < call.until; ++row) {
    const float *x = call.x + row * call.x_stride, *y = call.y + row * call.y_stride;
    float* to = call.to + row * call.to_stride;
    switch (step.op) {
      case kEmbedding: look_up(call, call.ids[row], to); break;
      case kPositions: look_up(call, call.positions[row], to); break;
      case kAngles: angles(call, call.positions[row], to); break;
      case kNorm: norm(call, x, to); break;
      case kMean: mean(call, x, to); break;
      case kRotary: rotary(call, x, y, to); break;
      case kColumns: pick(call, x, to); break;
      case kScores: scores(call, x, to); break;
      case kRoute: route(call, x, to); break;
      case kPlace: std::copy(x, x + call.x_width, to + step.start); break;
      default: pointwise(call, x, y, to);
    }
  }
  return kOk;
}
