// The gated delta rule. For each head with n key channels and p value channels, at each position:
//   S = exp(decay) * S,   S = S + k (x) beta * (v - k . S),   y = q . S
// S is [n][p]; decay is one number per head or one per key channel, q and k are those of the head's group.
//
// No column of S meets another: a tile of columns goes through all positions by itself, and stays in the first
// cache meanwhile.
#include "scan.h"

namespace {

constexpr int64_t kColumns = 64;  // of a tile

// A tile of 16 * P columns at one position, in place.
template <int P>
void move_on(const float* shrink, const float* k, const float* q, const Floats* v, float beta, float* s, Floats* y,
             int64_t n) {
  Floats held[P], change[P];
  for (int lane = 0; lane < P; ++lane) held[lane] = y[lane] = no_floats();
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int lane = 0; lane < P; ++lane) {
      float* at = s + i * kColumns + 16 * lane;
      const Floats own = times(load_floats(at), all(shrink[i]));
      store(at, own);
      held[lane] = fused(own, all(k[i]), held[lane]);
    }
  for (int lane = 0; lane < P; ++lane) change[lane] = times(plus(v[lane], times(held[lane], all(-1.0f))), all(beta));
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int lane = 0; lane < P; ++lane) {
      float* at = s + i * kColumns + 16 * lane;
      const Floats own = fused(change[lane], all(k[i]), load_floats(at));
      store(at, own);
      y[lane] = fused(own, all(q[i]), y[lane]);
    }
}

using Move = void (*)(const float*, const float*, const float*, const Floats*, float, float*, Floats*, int64_t);
constexpr Move kMoves[] = {nullptr, move_on<1>, move_on<2>, move_on<3>, move_on<4>};

struct Delta {
  const DeltaRuleCall& call;

  int64_t tiles() const { return (call.p + kColumns - 1) / kColumns; }  // of a head

  int32_t operator()(int64_t index) const {
    const int64_t column = index % tiles() * kColumns, head = index / tiles() % call.heads;
    const int64_t b = index / tiles() / call.heads, wide = std::min(kColumns, call.p - column);
    const int64_t group = head / (call.heads / call.groups), filled = (call.n + 15) / 16 * 16;
    auto* memory = static_cast<float*>(effc_scratch(0, 4 * (call.n * kColumns + filled)));
    if (!memory) return kNoMemory;
    float *s = memory, *shrink = memory + call.n * kColumns;
    const int64_t first = (b * call.heads + head) * call.n * call.p + column;
    const float* before = (call.before ? call.before : call.state) + first;
    for (int64_t i = 0; i < call.n; ++i)
      for (int64_t c = 0; c < wide; c += 16) store(s + i * kColumns + c, take(before + i * call.p + c, wide - c));
    for (int64_t t = 0; t < call.length; ++t) {
      shrunk(b, t, head, shrink);
      Floats v[4], y[4];
      const float* own = call.v.row<float>(b, t) + head * call.p + column;
      for (int64_t c = 0; c < wide; c += 16) v[c / 16] = take(own + c, wide - c);
      kMoves[(wide + 15) / 16](shrink, call.k.row<float>(b, t) + group * call.n,
                               call.q.row<float>(b, t) + group * call.n, v, call.beta.row<float>(b, t)[head], s, y,
                               call.n);
      float* out = call.y + ((b * call.length + t) * call.heads + head) * call.p + column;
      for (int64_t c = 0; c < wide; c += 16) give(out + c, y[c / 16], wide - c);
    }
    for (int64_t i = 0; i < call.n; ++i)
      for (int64_t c = 0; c < wide; c += 16)
        give(call.state + first + i * call.p + c, load_floats(s + i * kColumns + c), wide - c);
    return kOk;
  }

  // What each key channel keeps of its state.
  void shrunk(int64_t b, int64_t t, int64_t head, float* to) const {
    const float* decay = call.decay.row<float>(b, t);
    if (!call.by_channel) {
      std::fill(to, to + call.n, std::exp(decay[head]));
      return;
    }
    for (int64_t i = 0; i < call.n; i += 16) store(to + i, exponential(take(decay + head * call.n + i, call.n - i)));
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(delta_rule)(const DeltaRuleCall& call) {
  const Delta body{call};
  const int64_t count = call.batches * call.heads * body.tiles();
  return call.parts ? share_of(call.part, call.parts, count, body) : share(count, call.threads, body);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(delta_rule, DeltaRuleCall)

EFFC_API int32_t effc_delta_rule(int32_t level, const void* q, int64_t q_batch, int64_t q_step, const void* k,
                                 int64_t k_batch, int64_t k_step, const void* v, int64_t v_batch, int64_t v_step,
                                 const void* decay, int64_t decay_batch, int64_t decay_step, const void* beta,
                                 int64_t beta_batch, int64_t beta_step, float* y, float* state, int64_t batches,
                                 int64_t length, int64_t heads, int64_t groups, int64_t n, int64_t p,
                                 int32_t by_channel, int32_t threads) {
  const auto body = delta_rule_at(level);
  if (!body || batches < 0 || length < 0 || heads < 1 || n < 1 || p < 1 || groups < 1 || heads % groups)
    return kArguments;
  return body(DeltaRuleCall{{q, q_batch, q_step}, {k, k_batch, k_step}, {v, v_batch, v_step},
                            {decay, decay_batch, decay_step}, {beta, beta_batch, beta_step}, y, state, nullptr,
                            batches, length, heads, groups, n, p, by_channel, threads, 0, 0});
}
#endif
