// Gradients of the scan of Mamba-2. States are computed again: once to keep one per chunk, then chunk by
// chunk from the last. States of a channel lie in vectors here, since most sums run over them.
#include "scan.h"

struct SsdBackwardCall {
  const float *x, *grad;               // [batches, length, heads, p]
  const float* dt;                     // [batches, length, heads]
  const float *b, *c;                  // [batches, length, groups, n]
  const float *a, *d, *bias, *state;   // as in the scan
  const float* last;                   // [batches, heads, p, n]: gradient of the last state
  float* grad_x;                       // [batches, length, heads, p], zeros
  float* grad_dt;                      // [batches, length, heads], zeros
  float *grad_b, *grad_c;              // [batches, length, heads, n], zeros: of one head each
  float* grad_state;                   // [batches, heads, p, n]
  float *grad_a, *grad_d, *grad_bias;  // [batches, heads]
  Live live;
  int64_t batches, length, heads, p, groups, n;
  float least, most;
  int32_t softplus, threads;
};

namespace {

constexpr int64_t kSteps = 16;   // of a chunk

struct Backward {
  const SsdBackwardCall& call;

  int64_t width() const { return (call.n + 15) / 16 * 16; }   // states, filled up
  int64_t size() const { return call.p * width(); }

  struct Sums {
    float a = 0, d = 0, bias = 0;
  };

  // A position of one head.
  struct Place {
    int64_t row, group_row;   // of [batches, length, heads] and of [batches, length, groups]
    float raw, free, dt, decay;
    bool held;                // by a bound of dt: no gradient passes
  };

  Place place(int64_t b, int64_t head, int64_t t) const {
    Place at;
    at.row = (b * call.length + t) * call.heads + head;
    at.group_row = (b * call.length + t) * call.groups + head / (call.heads / call.groups);
    at.raw = call.dt[at.row] + (call.bias ? call.bias[head] : 0.0f);
    at.free = call.softplus ? (at.raw > 20.0f ? at.raw : std::log1p(std::exp(at.raw))) : at.raw;
    at.dt = std::min(std::max(at.free, call.least), call.most);
    at.held = at.dt != at.free;
    at.decay = std::exp(at.dt * call.a[head]);
    return at;
  }

  Floats of_b(const Place& at, int64_t i) const {
    return take(call.b + at.group_row * call.n + i, call.n - i);
  }
  Floats of_c(const Place& at, int64_t i) const {
    return take(call.c + at.group_row * call.n + i, call.n - i);
  }

  void forward(const Place& at, const float* h, float* next) const {
    const Floats decay = all(at.decay);
    for (int64_t i = 0; i < call.p; ++i) {
      const Floats input = all(at.dt * call.x[at.row * call.p + i]);
      for (int64_t j = 0; j < width(); j += 16)
        store(next + i * width() + j,
              fused(input, of_b(at, j), times(load_floats(h + i * width() + j), decay)));
    }
  }

  void load_state(const float* from, float* into) const {
    std::memset(into, 0, 4 * size());
    for (int64_t i = 0; from && i < call.p; ++i)
      std::memcpy(into + i * width(), from + i * call.n, 4 * call.n);
  }

  int32_t operator()(int64_t index) const {
    const int64_t b = index / call.heads, head = index % call.heads, whole = call.p * call.n;
    const int64_t first = call.live.first(b), last = call.live.last(b);
    const int64_t chunks = (last - first + kSteps - 1) / kSteps;
    const int64_t bytes = 4 * (size() * (2 + chunks + kSteps + 1) + 2 * width());
    auto* memory = static_cast<float*>(effc_scratch(0, bytes));
    if (!memory) return kNoMemory;
    float *h = memory, *carry = h + size(), *kept = carry + size(), *states = kept + chunks * size();
    float* rows = states + (kSteps + 1) * size();
    load_state(call.state ? call.state + index * whole : nullptr, h);
    load_state(call.last ? call.last + index * whole : nullptr, carry);
    for (int64_t t = first; t < last; ++t) {
      if ((t - first) % kSteps == 0) std::memcpy(kept + (t - first) / kSteps * size(), h, 4 * size());
      forward(place(b, head, t), h, h);
    }
    Sums sums;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t from = first + chunk * kSteps, to = std::min(last, from + kSteps);
      std::memcpy(states, kept + chunk * size(), 4 * size());
      for (int64_t t = from; t < to; ++t)
        forward(place(b, head, t), states + (t - from) * size(), states + (t - from + 1) * size());
      for (int64_t t = to - 1; t >= from; --t)
        backward(place(b, head, t), head, states + (t - from) * size(), carry, rows, sums);
    }
    for (int64_t i = 0; i < call.p; ++i)
      std::memcpy(call.grad_state + index * whole + i * call.n, carry + i * width(), 4 * call.n);
    call.grad_a[index] = sums.a;
    call.grad_d[index] = sums.d;
    call.grad_bias[index] = sums.bias;
    return kOk;
  }

  // `before` is the state that a position began with; behind it lies the one that it left.
  void backward(const Place& at, int64_t head, const float* before, float* carry, float* rows,
                Sums& sums) const {
    float *grad_b = rows, *grad_c = rows + width();
    std::memset(rows, 0, 8 * width());
    Floats felt = no_floats();
    float of_step = 0;
    const Floats decay = all(at.decay);
    for (int64_t i = 0; i < call.p; ++i) {
      const float x = call.x[at.row * call.p + i], grad = call.grad[at.row * call.p + i];
      const Floats out = all(grad), input = all(at.dt * x);
      Floats through = no_floats();
      for (int64_t j = 0; j < width(); j += 16) {
        const int64_t k = i * width() + j;
        const Floats own = fused(out, of_c(at, j), load_floats(carry + k));
        store(grad_c + j, fused(load_floats(before + size() + k), out, load_floats(grad_c + j)));
        store(grad_b + j, fused(own, input, load_floats(grad_b + j)));
        through = fused(own, of_b(at, j), through);
        felt = fused(own, load_floats(before + k), felt);
        store(carry + k, times(own, decay));
      }
      const float sum = total(through);
      call.grad_x[at.row * call.p + i] = at.dt * sum + (call.d ? call.d[head] * grad : 0.0f);
      of_step += x * sum;
      sums.d += grad * x;
    }
    std::memcpy(call.grad_b + at.row * call.n, grad_b, 4 * call.n);
    std::memcpy(call.grad_c + at.row * call.n, grad_c, 4 * call.n);
    const float faded = at.decay * total(felt);
    sums.a += at.dt * faded;
    float of_raw = at.held ? 0.0f : of_step + call.a[head] * faded;
    if (call.softplus) of_raw /= 1.0f + std::exp(-at.raw);
    call.grad_dt[at.row] = of_raw;
    sums.bias += of_raw;
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(ssd_scan_backward)(const SsdBackwardCall& call) {
  const Backward body{call};
  return share(call.batches * call.heads, call.threads, body);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(ssd_scan_backward, SsdBackwardCall)

EFFC_API int32_t effc_ssd_scan_backward(
    int32_t level, const float* x, const float* grad, const float* dt, const float* b, const float* c,
    const float* a, const float* d, const float* bias, const float* state, const float* last, float* grad_x,
    float* grad_dt, float* grad_b, float* grad_c, float* grad_state, float* grad_a, float* grad_d,
    float* grad_bias, const int64_t* bounds, int64_t batches, int64_t length, int64_t heads, int64_t p,
    int64_t groups, int64_t n, float least, float most, int32_t softplus, int32_t threads) {
  const auto body = ssd_scan_backward_at(level);
  const Live live{bounds, length};
  if (!body || batches < 0 || length < 0 || heads < 1 || p < 1 || n < 1 || groups < 1 || heads % groups ||
      !live.sound(batches))
    return kArguments;
  return body(SsdBackwardCall{x, grad, dt, b, c, a, d, bias, state, last, grad_x, grad_dt, grad_b, grad_c,
                              grad_state, grad_a, grad_d, grad_bias, live, batches, length, heads, p, groups,
                              n, least, most, softplus, threads});
}
#endif
