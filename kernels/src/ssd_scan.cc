// The scan of Mamba-2 (state-space duality). For each head with p channels and n states, at each position:
//   h = exp(dt * A) * h + dt * x (x) B,   y = h . C + D * x,   dt = clamp(softplus(dt + bias))
// A and dt are one number per head, B and C are those of the head's group.
//
// Time is cut into chunks. Within one a few states of some channels stay in registers for all of its
// positions; h lies as [n][p] meanwhile, so that nothing is summed across lanes. This takes 3 p n operations
// per position; the product form, (2 n + chunk / 2) p, would save a fifth at n = 128.
#include "scan.h"

// One position, h in place.
struct SsdStepCall {
  Rows x, dt, b, c;
  const float *a;         // [heads]: A, or with `a_is_log` log(-A) as checkpoints hold it
  const float *d, *bias;
  void* y;
  float* state;
  int64_t batches, heads, p, groups, n;
  int32_t is_float, softplus, a_is_log, threads;
};

namespace {

constexpr int64_t kChunk = 64;

inline float softplus_of(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// One tile, kStates states of 16 * P channels, over the positions of a chunk.
template <int P>
void tile(const float* decay, const float* input, const float* bc, float* h, float* y, int64_t count,
          int64_t width) {
  Floats own[kStates][P];
#pragma GCC unroll 4
  for (int i = 0; i < kStates; ++i)
#pragma GCC unroll 4
    for (int lane = 0; lane < P; ++lane) own[i][lane] = load_floats(h + i * width + 16 * lane);
  for (int64_t t = 0; t < count; ++t, input += width, y += width, bc += 2 * kStates) {
    Floats x[P], sum[P];
    const Floats shrink = all(decay[t]);
#pragma GCC unroll 4
    for (int lane = 0; lane < P; ++lane) {
      x[lane] = load_floats(input + 16 * lane);
      sum[lane] = load_floats(y + 16 * lane);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kStates; ++i) {
      const Floats b = all(bc[i]), c = all(bc[kStates + i]);
#pragma GCC unroll 4
      for (int lane = 0; lane < P; ++lane) {
        own[i][lane] = fused(x[lane], b, times(own[i][lane], shrink));
        sum[lane] = fused(own[i][lane], c, sum[lane]);
      }
    }
#pragma GCC unroll 4
    for (int lane = 0; lane < P; ++lane) store(y + 16 * lane, sum[lane]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kStates; ++i)
#pragma GCC unroll 4
    for (int lane = 0; lane < P; ++lane) store(h + i * width + 16 * lane, own[i][lane]);
}

using Tile = void (*)(const float*, const float*, const float*, float*, float*, int64_t, int64_t);
constexpr Tile kTiles[] = {nullptr, tile<1>, tile<kLanes < 2 ? 1 : 2>, tile<kLanes < 3 ? 1 : 3>,
                           tile<kLanes < 4 ? 1 : 4>};

// One thread's work: some heads of a group, all of which read the same B and C.
template <class T>
struct Ssd {
  const SsdScanCall& call;

  int64_t chunk() const { return std::min(kChunk, call.length); }
  int64_t width() const { return (call.p + 15) / 16 * 16; }              // channels, filled up
  int64_t tiles() const { return (call.n + kStates - 1) / kStates; }
  int64_t states() const { return tiles() * kStates * width(); }         // floats of a head
  int64_t heads() const { return call.heads / call.groups; }             // of a group
  int64_t parts() const {                                                // of a group
    const int64_t all_groups = std::max<int64_t>(1, call.batches * call.groups);
    const int64_t wanted = (call.threads + all_groups - 1) / all_groups;
    return std::max<int64_t>(1, std::min(wanted, heads()));
  }

  struct Room {
    float *bc;       // [tiles][chunk][2 * kStates]: B and C of a tile's states, position by position
    float *input;    // [chunk][width]: dt * x
    float *y;        // [chunk][width]
    float *h;        // [heads][tiles * kStates][width]
    float decay[kChunk];
  };

  int32_t operator()(int64_t index) const {
    const int64_t part = index % parts(), group = index / parts() % call.groups;
    const int64_t b = index / parts() / call.groups;
    const int64_t start = group * heads() + heads() * part / parts();
    const int64_t end = group * heads() + heads() * (part + 1) / parts();
    const int64_t pairs = tiles() * chunk() * 2 * kStates, rows = chunk() * width();
    const int64_t held = call.in_lanes ? 0 : (end - start) * states();
    const int64_t bytes = 4 * (pairs + 2 * rows + held);
    auto* memory = static_cast<float*>(effc_scratch(0, bytes));
    if (!memory) return kNoMemory;
    std::memset(memory, 0, bytes);
    Room room{memory, memory + pairs, memory + pairs + rows, memory + pairs + 2 * rows, {}};
    if (call.in_lanes) {
      room.h = call.state + (b * call.heads + start) * states();
      if (call.before) std::memcpy(room.h, call.before + (room.h - call.state), 4 * (end - start) * states());
    }
    for (int64_t head = start; head < end; ++head) move(room, head - start, b, head, true);
    const int64_t first = call.live.first(b), last = call.live.last(b);
    for (int64_t t = 0; t < call.length; ++t)
      if (t < first || t >= last) std::memset(out(b, t, start), 0, (end - start) * call.p * sizeof(T));
    for (int64_t from = first; from < last; from += chunk()) {
      const int64_t to = std::min(last, from + chunk());
      gather(room, b, group, from, to);
      for (int64_t head = start; head < end; ++head)
        positions(room, room.h + (head - start) * states(), b, head, from, to);
    }
    for (int64_t head = start; head < end; ++head) move(room, head - start, b, head, false);
    return kOk;
  }

  // The state of a head to [n][p], or back.
  void move(const Room& room, int64_t index, int64_t b, int64_t head, bool into) const {
    if (call.in_lanes) return;
    float* h = room.h + index * states();
    float* state = call.state + (b * call.heads + head) * call.p * call.n;
    for (int64_t i = 0; i < call.p; ++i)
      for (int64_t j = 0; j < call.n; ++j)
        if (into)
          h[j * width() + i] = state[i * call.n + j];
        else
          state[i * call.n + j] = h[j * width() + i];
  }

  T* out(int64_t b, int64_t t, int64_t head) const {
    return static_cast<T*>(call.y) + ((b * call.length + t) * call.heads + head) * call.p;
  }

  void gather(Room& room, int64_t b, int64_t group, int64_t from, int64_t to) const {
    for (int64_t t = from; t < to; ++t) {
      const T *own_b = call.b.row<T>(b, t) + group * call.n, *own_c = call.c.row<T>(b, t) + group * call.n;
      for (int64_t i = 0; i < call.n; ++i) {
        float* pair = room.bc + ((i / kStates) * chunk() + t - from) * 2 * kStates + i % kStates;
        pair[0] = number(own_b[i]);
        pair[kStates] = number(own_c[i]);
      }
    }
  }

  void positions(Room& room, float* h, int64_t b, int64_t head, int64_t from, int64_t to) const {
    for (int64_t t = from; t < to; ++t) prepare(room, b, head, t, t - from);
    for (int64_t i = 0; i < tiles(); ++i)
      for (int64_t lane = 0; lane < width(); lane += 16 * kLanes) {
        const int64_t wide = std::min<int64_t>(kLanes, (width() - lane) / 16);
        kTiles[wide](room.decay, room.input + lane, room.bc + i * chunk() * 2 * kStates,
                     h + i * kStates * width() + lane, room.y + lane, to - from, width());
      }
    for (int64_t t = from; t < to; ++t)
      for (int64_t i = 0; i < call.p; i += 16)
        give(out(b, t, head) + i, load_floats(room.y + (t - from) * width() + i), call.p - i);
  }

  // What a position adds to the state, and what of its output passes the state by.
  void prepare(Room& room, int64_t b, int64_t head, int64_t t, int64_t at) const {
    float dt = number(call.dt.row<T>(b, t)[head]) + (call.bias ? call.bias[head] : 0.0f);
    if (call.softplus) dt = softplus_of(dt);
    dt = std::min(std::max(dt, call.least), call.most);
    room.decay[at] = std::exp(dt * call.a[head]);
    const T* x = call.x.row<T>(b, t) + head * call.p;
    const Floats skip = all(call.d ? call.d[head] : 0.0f);
    for (int64_t i = 0; i < call.p; i += 16) {
      const Floats own = take(x + i, call.p - i);
      store(room.input + at * width() + i, times(own, all(dt)));
      store(room.y + at * width() + i, times(own, skip));
    }
  }
};

template <class T>
struct Step {
  const SsdStepCall& call;

  int32_t operator()(int64_t index) const {
    const int64_t b = index / call.heads, head = index % call.heads;
    const int64_t group = head / (call.heads / call.groups);
    float dt = number(call.dt.row<T>(b, 0)[head]) + (call.bias ? call.bias[head] : 0.0f);
    if (call.softplus) dt = softplus_of(dt);
    const float rate = call.a_is_log ? -std::exp(call.a[head]) : call.a[head];
    const Floats decay = all(std::exp(dt * rate));
    const T* x = call.x.row<T>(b, 0) + head * call.p;
    const T *own_b = call.b.row<T>(b, 0) + group * call.n, *own_c = call.c.row<T>(b, 0) + group * call.n;
    T* y = static_cast<T*>(call.y) + index * call.p;
    for (int64_t i = 0; i < call.p; ++i) {
      float* h = call.state + (index * call.p + i) * call.n;
      const Floats input = all(dt * number(x[i]));
      Floats sum = no_floats();
      for (int64_t j = 0; j < call.n; j += 16) {
        const int64_t count = call.n - j;
        const Floats now = fused(input, take(own_b + j, count), times(take(h + j, count), decay));
        give(h + j, now, count);
        sum = fused(now, take(own_c + j, count), sum);
      }
      put(y + i, total(sum) + (call.d ? call.d[head] * number(x[i]) : 0.0f));
    }
    return kOk;
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(ssd_scan)(const SsdScanCall& call) {
  const Ssd<float> wide{call};
  const Ssd<uint16_t> narrow{call};
  const int64_t count = call.batches * call.groups * wide.parts();
  if (call.parts) return share_of(call.part, call.parts, count, wide);
  return call.is_float ? share(count, call.threads, wide) : share(count, call.threads, narrow);
}

int32_t EFFC_AT_LEVEL(ssd_step)(const SsdStepCall& call) {
  const Step<float> wide{call};
  const Step<uint16_t> narrow{call};
  const int64_t count = call.batches * call.heads;
  const int32_t threads = count * call.p * call.n < 100000 ? 1 : call.threads;
  return call.is_float ? share(count, threads, wide) : share(count, threads, narrow);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(ssd_scan, SsdScanCall)
EFFC_TABLE(ssd_step, SsdStepCall)

EFFC_API int32_t effc_ssd_scan(int32_t level, const void* x, int64_t x_batch, int64_t x_step, const void* dt,
                               int64_t dt_batch, int64_t dt_step, const void* b, int64_t b_batch,
                               int64_t b_step, const void* c, int64_t c_batch, int64_t c_step,
                               const float* a, const float* d, const float* bias, void* y, float* state,
                               const int64_t* bounds, int64_t batches, int64_t length, int64_t heads,
                               int64_t p, int64_t groups, int64_t n, float least, float most,
                               int32_t is_float, int32_t softplus, int32_t threads) {
  const auto body = ssd_scan_at(level);
  const Live live{bounds, length};
  if (!body || batches < 0 || length < 0 || heads < 1 || p < 1 || n < 1 || groups < 1 || heads % groups ||
      !live.sound(batches))
    return kArguments;
  return body(SsdScanCall{{x, x_batch, x_step}, {dt, dt_batch, dt_step}, {b, b_batch, b_step},
                          {c, c_batch, c_step}, a, d, bias, y, state, live, batches, length, heads, p, groups,
                          n, least, most, is_float, softplus, threads, 0, 0, 0, nullptr});
}

EFFC_API int32_t effc_ssd_step(int32_t level, const void* x, int64_t x_batch, const void* dt,
                               int64_t dt_batch, const void* b, int64_t b_batch, const void* c,
                               int64_t c_batch, const float* a, const float* d, const float* bias, void* y,
                               float* state, int64_t batches, int64_t heads, int64_t p, int64_t groups,
                               int64_t n, int32_t is_float, int32_t softplus, int32_t a_is_log,
                               int32_t threads) {
  const auto body = ssd_step_at(level);
  if (!body || batches < 0 || heads < 1 || p < 1 || n < 1 || groups < 1 || heads % groups) return kArguments;
  return body(SsdStepCall{{x, x_batch, 0}, {dt, dt_batch, 0}, {b, b_batch, 0}, {c, c_batch, 0}, a, d, bias, y,
                          state, batches, heads, p, groups, n, is_float, softplus, a_is_log, threads});
}
#endif
