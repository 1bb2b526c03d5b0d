// The selective scan of Mamba-1. For each channel with n states, position by position:
//   h = exp(dt * A) * h + dt * x * B,   y = (C . h + D * x) * silu(z),   dt = softplus(dt + bias)
// 16 channels lie in a vector, so that nothing is summed across its lanes.
#include "scan.h"

// One position, h in place.
struct SelectiveStepCall {
  Rows x, dt, z;           // [batches, channels]
  Rows b, c;               // [batches, n]
  const float *a;          // [channels, n]: A, or with `a_is_log` log(-A) as checkpoints hold it
  const float *d, *bias;
  void* y;
  float* state;
  int64_t batches, channels, n;
  int32_t is_float, softplus, a_is_log, threads;
};

namespace {

// An [up to 16, n] matrix of channels to [n][16] and back.
void to_lanes(const float* from, float* into, int64_t channels, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t lane = 0; lane < 16; ++lane)
      into[16 * i + lane] = lane < channels ? from[lane * n + i] : 0.0f;
}
void from_lanes(const float* from, float* into, int64_t channels, int64_t n) {
  for (int64_t lane = 0; lane < channels; ++lane)
    for (int64_t i = 0; i < n; ++i) into[lane * n + i] = from[16 * i + lane];
}

template <class T>
struct Scan {
  const SelectiveScanCall& call;

  int64_t blocks() const { return (call.channels + 15) / 16; }

  // Time steps of 16 positions from t on, [16][16]: turned round here where dt lies channel by channel.
  void time_steps(int64_t b, int64_t t, int64_t c, Floats bias, float* into) const {
    const int64_t count = std::min<int64_t>(16, call.live.last(b) - t);
    const int64_t width = std::min<int64_t>(16, call.channels - c);
    if (call.dt_channel == 1) {
      for (int64_t i = 0; i < count; ++i) store(into + 16 * i, take(call.dt.row<T>(b, t + i) + c, width));
    } else {
      for (int64_t lane = 0; lane < width; ++lane) {
        const T* own = call.dt.row<T>(b, t) + (c + lane) * call.dt_channel;
        for (int64_t i = 0; i < count; ++i) into[16 * i + lane] = number(own[i * call.dt.step]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Floats raw = plus(load_floats(into + 16 * i), bias);
      store(into + 16 * i, call.softplus ? softplus(raw) : raw);
    }
  }

  void soon(int64_t b, int64_t t, int64_t c) const {
    ahead(reinterpret_cast<const uint8_t*>(call.x.row<T>(b, t) + c));
    if (call.z.at) ahead(reinterpret_cast<const uint8_t*>(call.z.row<T>(b, t) + c));
  }

  int32_t operator()(int64_t index) const {
    const int64_t b = index / blocks(), c = index % blocks() * 16, n = call.n, width = call.channels - c;
    auto* a = static_cast<float*>(effc_scratch(0, 128 * n));
    if (!a) return kNoMemory;
    const float* rates = a;
    float *h = a + 16 * n, *state = call.state + (b * call.channels + c) * n;
    if (call.in_lanes) {
      rates = call.a + c * n;
      h = call.state + (b * blocks() * 16 + c) * n;
      if (call.before) std::memcpy(h, call.before + (h - call.state), 64 * n);
    } else {
      to_lanes(call.a + c * n, a, std::min<int64_t>(16, width), n);
      to_lanes(state, h, std::min<int64_t>(16, width), n);
    }
    const Floats bias = call.bias ? take(call.bias + c, width) : no_floats();
    const Floats skip = call.d ? take(call.d + c, width) : no_floats();
    const int64_t first = call.live.first(b), last = call.live.last(b);
    T* y = static_cast<T*>(call.y) + b * call.length * call.channels + c;
    alignas(64) float steps[256] = {};
    for (int64_t t = 0; t < call.length; ++t) {
      if (t < first || t >= last) {
        give(y + t * call.channels, no_floats(), width);
        continue;
      }
      if (t + 8 < last) soon(b, t + 8, c);
      if ((t - first) % 16 == 0) time_steps(b, t, c, bias, steps);
      const Floats dt = load_floats(steps + (t - first) % 16 * 16), x = take(call.x.row<T>(b, t) + c, width);
      Floats sum = position(dt, times(dt, x), call.b.row<T>(b, t), call.c.row<T>(b, t), rates, h);
      sum = fused(skip, x, sum);
      if (call.z.at) sum = times(sum, silu(take(call.z.row<T>(b, t) + c, width)));
      give(y + t * call.channels, sum, width);
    }
    if (!call.in_lanes) from_lanes(h, state, std::min<int64_t>(16, width), n);
    return kOk;
  }

  Floats position(Floats dt, Floats input, const T* b, const T* c, const float* a, float* h) const {
    Floats sum = no_floats();
    for (int64_t i = 0; i < call.n; ++i) {
      const Floats decay = exponential(times(dt, load_floats(a + 16 * i)));
      const Floats now = fused(decay, load_floats(h + 16 * i), times(input, all(number(b[i]))));
      store(h + 16 * i, now);
      sum = fused(now, all(number(c[i])), sum);
    }
    return sum;
  }
};

// In a single position states of a channel lie in a vector: they need not be moved.
template <class T>
struct Step {
  const SelectiveStepCall& call;

  int64_t blocks() const { return (call.channels + 15) / 16; }

  int32_t operator()(int64_t index) const {
    const int64_t b = index / blocks(), c = index % blocks() * 16;
    const int64_t width = std::min<int64_t>(16, call.channels - c);
    alignas(64) float dt[16], input[16], y[16];
    Floats raw = take(call.dt.row<T>(b, 0) + c, width);
    if (call.bias) raw = plus(raw, take(call.bias + c, width));
    const Floats x = take(call.x.row<T>(b, 0) + c, width), step = call.softplus ? softplus(raw) : raw;
    store(dt, step);
    store(input, times(step, x));
    for (int64_t lane = 0; lane < width; ++lane) y[lane] = channel(b, c + lane, dt[lane], input[lane]);
    Floats sum = take(y, width);
    if (call.d) sum = fused(take(call.d + c, width), x, sum);
    if (call.z.at) sum = times(sum, silu(take(call.z.row<T>(b, 0) + c, width)));
    give(static_cast<T*>(call.y) + b * call.channels + c, sum, width);
    return kOk;
  }

  float channel(int64_t b, int64_t c, float dt, float input) const {
    float* h = call.state + (b * call.channels + c) * call.n;
    const float* a = call.a + c * call.n;
    Floats sum = no_floats();
    for (int64_t i = 0; i < call.n; i += 16) {
      const int64_t count = call.n - i;
      Floats rate = take(a + i, count);
      if (call.a_is_log) rate = times(exponential(rate), all(-1.0f));
      const Floats decay = exponential(times(all(dt), rate));
      const Floats driven = times(all(input), take(call.b.row<T>(b, 0) + i, count));
      const Floats now = fused(decay, take(h + i, count), driven);
      give(h + i, now, count);
      sum = fused(now, take(call.c.row<T>(b, 0) + i, count), sum);
    }
    return total(sum);
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(selective_scan)(const SelectiveScanCall& call) {
  const Scan<float> wide{call};
  const Scan<uint16_t> narrow{call};
  const int64_t count = call.batches * wide.blocks();
  if (call.parts) return share_of(call.part, call.parts, count, wide);
  return call.is_float ? share(count, call.threads, wide) : share(count, call.threads, narrow);
}

int32_t EFFC_AT_LEVEL(selective_step)(const SelectiveStepCall& call) {
  const Step<float> wide{call};
  const Step<uint16_t> narrow{call};
  const int64_t count = call.batches * wide.blocks();
  const int32_t threads = call.batches * call.channels * call.n < 100000 ? 1 : call.threads;
  return call.is_float ? share(count, threads, wide) : share(count, threads, narrow);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(selective_scan, SelectiveScanCall)
EFFC_TABLE(selective_step, SelectiveStepCall)

EFFC_API int32_t effc_selective_scan(
    int32_t level, const void* x, int64_t x_batch, int64_t x_step, const void* dt, int64_t dt_batch,
    int64_t dt_step, int64_t dt_channel, const void* z, int64_t z_batch, int64_t z_step, const void* b,
    int64_t b_batch, int64_t b_step, const void* c, int64_t c_batch, int64_t c_step, const float* a,
    const float* d, const float* bias, void* y, float* state, const int64_t* bounds, int64_t batches,
    int64_t length, int64_t channels, int64_t n, int32_t is_float, int32_t softplus, int32_t threads) {
  const auto body = selective_scan_at(level);
  const Live live{bounds, length};
  if (!body || batches < 0 || length < 0 || channels < 1 || n < 1 || !live.sound(batches)) return kArguments;
  return body(SelectiveScanCall{{x, x_batch, x_step}, {dt, dt_batch, dt_step}, {z, z_batch, z_step},
                                dt_channel, {b, b_batch, b_step}, {c, c_batch, c_step}, a, d, bias, y, state,
                                live, batches, length, channels, n, is_float, softplus, threads, 0, 0, 0,
                                nullptr});
}

EFFC_API int32_t effc_selective_step(int32_t level, const void* x, int64_t x_batch, const void* dt,
                                     int64_t dt_batch, const void* z, int64_t z_batch, const void* b,
                                     int64_t b_batch, const void* c, int64_t c_batch, const float* a,
                                     const float* d, const float* bias, void* y, float* state,
                                     int64_t batches, int64_t channels, int64_t n, int32_t is_float,
                                     int32_t softplus, int32_t a_is_log, int32_t threads) {
  const auto body = selective_step_at(level);
  if (!body || batches < 0 || channels < 1 || n < 1) return kArguments;
  return body(SelectiveStepCall{{x, x_batch, 0}, {dt, dt_batch, 0}, {z, z_batch, 0}, {b, b_batch, 0},
                                {c, c_batch, 0}, a, d, bias, y, state, batches, channels, n, is_float,
                                softplus, a_is_log, threads});
}
#endif
