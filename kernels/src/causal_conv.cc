// A filter per channel along the sequence, each place summed with the k - 1 before it, then perhaps silu.
#include "scan.h"

// One new place: the state moves on by it.
struct CausalConvStepCall {
  Rows x;                // [batches, channels]
  void* state;           // [batches, channels, width], width >= k - 1: the last inputs; as x
  const float* weight;   // [channels, k]
  const float* bias;
  void* y;               // [batches, channels]
  int64_t batches, channels, width, k;
  int32_t is_float, silu;
};

namespace {

constexpr int64_t kPlaces = 32;  // that a thread takes at a time

template <class T>
struct Conv {
  const CausalConvCall& call;

  // Where the input at a place of a sequence lies: in x, in what came before, or in a row of zeros.
  const T* input(int64_t b, int64_t t, const T* zeros) const {
    const int64_t into = t - call.live.first(b);
    if (into >= 0) return call.x.row<T>(b, t);
    if (!call.before) return zeros;
    return static_cast<const T*>(call.before) + ((b + 1) * (call.k - 1) + into) * call.wide;
  }

  // K is k where that is known to the compiler, else 0.
  template <int K>
  void place(int64_t b, int64_t t, const T** from, const T* zeros) const {
    const int64_t k = K ? K : call.k;
    for (int64_t j = 0; j < k; ++j) from[j] = input(b, t - k + 1 + j, zeros);
    T* y = static_cast<T*>(call.y) + (b * call.length + t) * call.wide;
    int64_t c = 0;
    for (; c + 16 <= call.channels; c += 16) give(y + c, sum<K>(from, c, 16), 16);
    if (c < call.channels) give(y + c, sum<K>(from, c, call.channels - c), call.channels - c);
  }

  template <int K>
  Floats sum(const T* const* from, int64_t c, int64_t count) const {
    const int64_t k = K ? K : call.k;
    Floats sum = call.bias ? take(call.bias + c, count) : no_floats();
#pragma GCC unroll 4
    for (int64_t j = 0; j < k; ++j)
      sum = fused(take(call.weight + j * call.wide + c, count), take(from[j] + c, count), sum);
    return call.silu ? silu(sum) : sum;
  }

  int32_t operator()(int64_t i) const {
    const int64_t pieces = (call.length + kPlaces - 1) / kPlaces;
    const int64_t b = i / pieces, start = i % pieces * kPlaces;
    const int64_t pointers = (8 * call.k + 63) / 64 * 64;
    auto* memory = static_cast<uint8_t*>(effc_scratch(0, pointers + call.channels * sizeof(T) + 64));
    if (!memory) return kNoMemory;
    auto** from = reinterpret_cast<const T**>(memory);
    auto* zeros = reinterpret_cast<T*>(memory + pointers);
    std::memset(zeros, 0, call.channels * sizeof(T));
    for (int64_t t = start; t < std::min(call.length, start + kPlaces); ++t)
      if (t < call.live.first(b) || t >= call.live.last(b))
        std::memset(static_cast<T*>(call.y) + (b * call.length + t) * call.wide, 0,
                    call.channels * sizeof(T));
      else if (call.k == 4)
        place<4>(b, t, from, zeros);
      else
        place<0>(b, t, from, zeros);
    return kOk;
  }
};

template <class T>
int32_t convolve(const CausalConvCall& call) {
  const Conv<T> body{call};
  return share(call.batches * ((call.length + kPlaces - 1) / kPlaces), call.threads, body);
}

template <class T>
int32_t step(const CausalConvStepCall& call) {
  auto* sums = static_cast<float*>(effc_scratch(0, 4 * call.channels + 64));
  if (!sums) return kNoMemory;
  for (int64_t b = 0; b < call.batches; ++b) {
    const T* x = call.x.row<T>(b, 0);
    T* y = static_cast<T*>(call.y) + b * call.channels;
    for (int64_t c = 0; c < call.channels; ++c) {
      T* state = static_cast<T*>(call.state) + (b * call.channels + c) * call.width;
      const float* weight = call.weight + c * call.k;
      float sum = call.bias ? call.bias[c] : 0.0f;
      for (int64_t j = 0; j + 1 < call.k; ++j) sum += weight[j] * number(state[call.width - call.k + 1 + j]);
      sums[c] = sum + weight[call.k - 1] * number(x[c]);
      for (int64_t j = 0; j + 1 < call.width; ++j) state[j] = state[j + 1];
      if (call.width) state[call.width - 1] = x[c];
    }
    for (int64_t c = 0; c < call.channels; c += 16) {
      const int64_t count = call.channels - c;
      const Floats sum = take(sums + c, count);
      give(y + c, call.silu ? silu(sum) : sum, count);
    }
  }
  return kOk;
}

}  // namespace

int32_t EFFC_AT_LEVEL(causal_conv)(const CausalConvCall& call) {
  return call.is_float ? convolve<float>(call) : convolve<uint16_t>(call);
}

int32_t EFFC_AT_LEVEL(causal_conv_step)(const CausalConvStepCall& call) {
  return call.is_float ? step<float>(call) : step<uint16_t>(call);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(causal_conv, CausalConvCall)
EFFC_TABLE(causal_conv_step, CausalConvStepCall)

EFFC_API int32_t effc_causal_conv(int32_t level, const void* x, int64_t x_batch, int64_t x_step,
                                  const float* weight, const float* bias, const void* before, void* y,
                                  const int64_t* bounds, int64_t batches, int64_t length, int64_t channels,
                                  int64_t k, int32_t is_float, int32_t silu, int32_t threads) {
  const auto body = causal_conv_at(level);
  const Live live{bounds, length};
  if (!body || batches < 0 || length < 0 || channels < 1 || k < 1 || !live.sound(batches)) return kArguments;
  return body(CausalConvCall{{x, x_batch, x_step}, weight, bias, before, y, live, batches, length, channels,
                             k, is_float, silu, threads, channels});
}

EFFC_API int32_t effc_causal_conv_step(int32_t level, const void* x, int64_t x_batch, void* state,
                                       const float* weight, const float* bias, void* y, int64_t batches,
                                       int64_t channels, int64_t width, int64_t k, int32_t is_float,
                                       int32_t silu) {
  const auto body = causal_conv_step_at(level);
  if (!body || batches < 0 || channels < 1 || k < 1 || width < k - 1) return kArguments;
  return body(CausalConvStepCall{{x, x_batch, 0}, state, weight, bias, y, batches, channels, width, k,
                                 is_float, silu});
}
#endif
