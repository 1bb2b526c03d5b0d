// Gradients of the selective scan. States are computed again: once to keep one per chunk, then chunk by chunk
// from the last, so that memory is that of a chunk and of a state for each.
#include "scan.h"

struct SelectiveBackwardCall {
  const float *x, *dt, *z, *grad;      // [batches, length, channels]; z null: no gate
  const float *b, *c;                  // [batches, length, n]
  const float *a, *d, *bias, *state;   // as in the scan
  const float* last;                   // [batches, channels, n]: gradient of the last state
  float *grad_x, *grad_dt, *grad_z;    // [batches, length, channels], zeros
  float *grad_b, *grad_c;              // [batches, blocks of 16 channels, length, n], zeros
  float *grad_a, *grad_state;          // [batches, channels, n]
  float *grad_d, *grad_bias;           // [batches, channels]
  Live live;
  int64_t batches, length, channels, n;
  int32_t softplus, threads;
};

namespace {

constexpr int64_t kSteps = 32;   // of a chunk

struct Backward {
  const SelectiveBackwardCall& call;

  int64_t blocks() const { return (call.channels + 15) / 16; }

  // What a thread holds: matrices [n][16].
  struct Room {
    float *a, *h, *carry, *grad_a;
    float *kept;       // one state per chunk: the one that it begins with
    float *states;     // [kSteps + 1]
    float *decays;     // [kSteps]
  };

  struct Place {
    int64_t b, block, c, width;
    int64_t row(const SelectiveBackwardCall& call, int64_t t) const {
      return (b * call.length + t) * call.channels + c;
    }
  };

  Floats raw(const Place& at, int64_t t) const {
    const Floats own = take(call.dt + at.row(call, t), at.width);
    return call.bias ? plus(own, take(call.bias + at.c, at.width)) : own;
  }
  Floats step(const Place& at, int64_t t) const { return call.softplus ? softplus(raw(at, t)) : raw(at, t); }

  void lanes(const float* from, float* into, const Place& at) const {
    for (int64_t i = 0; i < call.n; ++i)
      for (int64_t lane = 0; lane < 16; ++lane)
        into[16 * i + lane] =
            from && lane < at.width ? from[(at.b * call.channels + at.c + lane) * call.n + i] : 0.0f;
  }

  // h moves on by one position; its decay is kept where asked.
  void forward(const Place& at, int64_t t, const float* a, const float* h, float* next, float* decays) const {
    const Floats dt = step(at, t), input = times(dt, take(call.x + at.row(call, t), at.width));
    const float* b = call.b + (at.b * call.length + t) * call.n;
    for (int64_t i = 0; i < call.n; ++i) {
      const Floats decay = exponential(times(dt, load_floats(a + 16 * i)));
      if (decays) store(decays + 16 * i, decay);
      store(next + 16 * i, fused(decay, load_floats(h + 16 * i), times(input, all(b[i]))));
    }
  }

  int32_t operator()(int64_t index) const {
    const Place at{index / blocks(), index % blocks(), index % blocks() * 16,
                   std::min<int64_t>(16, call.channels - index % blocks() * 16)};
    const int64_t first = call.live.first(at.b), last = call.live.last(at.b), size = 16 * call.n;
    const int64_t chunks = (last - first + kSteps - 1) / kSteps;
    auto* memory = static_cast<float*>(effc_scratch(0, 4 * size * (4 + chunks + 2 * kSteps + 1)));
    if (!memory) return kNoMemory;
    Room room{memory, memory + size, memory + 2 * size, memory + 3 * size, memory + 4 * size,
              memory + (4 + chunks) * size, memory + (5 + chunks + kSteps) * size};
    for (int64_t i = 0; i < call.n; ++i)
      for (int64_t lane = 0; lane < 16; ++lane)
        room.a[16 * i + lane] = lane < at.width ? call.a[(at.c + lane) * call.n + i] : 0.0f;
    lanes(call.state, room.h, at);
    lanes(call.last, room.carry, at);
    std::memset(room.grad_a, 0, 4 * size);
    for (int64_t t = first; t < last; ++t) {
      if ((t - first) % kSteps == 0) std::memcpy(room.kept + (t - first) / kSteps * size, room.h, 4 * size);
      forward(at, t, room.a, room.h, room.h, nullptr);
    }
    Floats skip = no_floats(), offset = no_floats();
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t from = first + chunk * kSteps, to = std::min(last, from + kSteps);
      std::memcpy(room.states, room.kept + chunk * size, 4 * size);
      for (int64_t t = from; t < to; ++t) {
        float* h = room.states + (t - from) * size;
        forward(at, t, room.a, h, h + size, room.decays + (t - from) * size);
      }
      for (int64_t t = to - 1; t >= from; --t)
        backward(at, t, room, room.states + (t - from) * size, room.decays + (t - from) * size, skip, offset);
    }
    finish(at, room, skip, offset);
    return kOk;
  }

  // `before` is the state that a position began with; behind it lies the one that it left.
  void backward(const Place& at, int64_t t, Room& room, const float* before, const float* decays,
                Floats& skip, Floats& offset) const {
    const int64_t row = at.row(call, t), size = 16 * call.n;
    const int64_t shared = (at.b * call.length + t) * call.n;
    const float *b = call.b + shared, *c = call.c + shared;
    float* grad_b = call.grad_b + ((at.b * blocks() + at.block) * call.length + t) * call.n;
    float* grad_c = call.grad_c + ((at.b * blocks() + at.block) * call.length + t) * call.n;
    const Floats dt = step(at, t), x = take(call.x + row, at.width), input = times(dt, x);
    const Floats d = call.d ? take(call.d + at.c, at.width) : no_floats();
    Floats grad = take(call.grad + row, at.width);
    if (call.z) grad = ungated(grad, row, at.width, times(d, x), before + size, c);
    Floats through = no_floats(), rate = no_floats();
    for (int64_t i = 0; i < call.n; ++i) {
      const Floats own = fused(grad, all(c[i]), load_floats(room.carry + 16 * i));
      grad_c[i] = total(times(load_floats(before + size + 16 * i), grad));
      grad_b[i] = total(times(own, input));
      through = fused(own, all(b[i]), through);
      const Floats faded = times(own, load_floats(decays + 16 * i));
      const Floats felt = times(faded, load_floats(before + 16 * i));
      rate = fused(load_floats(room.a + 16 * i), felt, rate);
      store(room.grad_a + 16 * i, fused(dt, felt, load_floats(room.grad_a + 16 * i)));
      store(room.carry + 16 * i, faded);
    }
    give(call.grad_x + row, fused(d, grad, times(dt, through)), at.width);
    Floats of_step = fused(x, through, rate);
    if (call.softplus) of_step = times(of_step, sigmoid(raw(at, t)));
    give(call.grad_dt + row, of_step, at.width);
    skip = fused(grad, x, skip);
    offset = plus(offset, of_step);
  }

  // The gradient before the gate, and that of the gate.
  Floats ungated(Floats grad, int64_t row, int64_t width, Floats y, const float* h, const float* c) const {
    for (int64_t i = 0; i < call.n; ++i) y = fused(load_floats(h + 16 * i), all(c[i]), y);
    const Floats z = take(call.z + row, width), s = sigmoid(z);
    const Floats slope = times(s, fused(z, plus(all(1.0f), times(s, all(-1.0f))), all(1.0f)));
    give(call.grad_z + row, times(times(grad, y), slope), width);
    return times(grad, times(z, s));
  }

  void finish(const Place& at, const Room& room, Floats skip, Floats offset) const {
    const int64_t from = at.b * call.channels + at.c;
    for (int64_t lane = 0; lane < at.width; ++lane)
      for (int64_t i = 0; i < call.n; ++i) {
        call.grad_a[(from + lane) * call.n + i] = room.grad_a[16 * i + lane];
        call.grad_state[(from + lane) * call.n + i] = room.carry[16 * i + lane];
      }
    give(call.grad_d + from, skip, at.width);
    give(call.grad_bias + from, offset, at.width);
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(selective_scan_backward)(const SelectiveBackwardCall& call) {
  const Backward body{call};
  return share(call.batches * body.blocks(), call.threads, body);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(selective_scan_backward, SelectiveBackwardCall)

EFFC_API int32_t effc_selective_scan_backward(
    int32_t level, const float* x, const float* dt, const float* z, const float* grad, const float* b,
    const float* c, const float* a, const float* d, const float* bias, const float* state, const float* last,
    float* grad_x, float* grad_dt, float* grad_z, float* grad_b, float* grad_c, float* grad_a,
    float* grad_state, float* grad_d, float* grad_bias, const int64_t* bounds, int64_t batches,
    int64_t length, int64_t channels, int64_t n, int32_t softplus, int32_t threads) {
  const auto body = selective_scan_backward_at(level);
  const Live live{bounds, length};
  if (!body || batches < 0 || length < 0 || channels < 1 || n < 1 || !live.sound(batches)) return kArguments;
  return body(SelectiveBackwardCall{x, dt, z, grad, b, c, a, d, bias, state, last, grad_x, grad_dt, grad_z,
                                    grad_b, grad_c, grad_a, grad_state, grad_d, grad_bias, live, batches,
                                    length, channels, n, softplus, threads});
}
#endif
