// y = weight * u / sqrt(mean(u * u) + eps), u = x * silu(gate), the mean over each group of a row's channels.
#include "scan.h"

struct GatedNormCall {
  Rows x, gate;          // [rows, groups * width]; gate null: u = x
  const float* weight;   // [groups * width]
  void* y;               // [rows, groups * width]
  int64_t rows, groups, width;
  float eps;
  int32_t is_float, threads;
};

namespace {

constexpr int64_t kRows = 16;  // that a thread takes at a time

template <class T>
struct Norm {
  const GatedNormCall& call;

  int32_t operator()(int64_t index) const {
    auto* u = static_cast<float*>(effc_scratch(0, 4 * call.width + 64));
    if (!u) return kNoMemory;
    for (int64_t row = index * kRows; row < std::min(call.rows, (index + 1) * kRows); ++row)
      for (int64_t group = 0; group < call.groups; ++group) part(u, row, group * call.width);
    return kOk;
  }

  void part(float* u, int64_t row, int64_t from) const {
    const T* x = call.x.row<T>(row, 0) + from;
    Floats squares[4] = {no_floats(), no_floats(), no_floats(), no_floats()};
    for (int64_t i = 0; i < call.width; i += 16) {
      const int64_t count = call.width - i;
      Floats own = take(x + i, count);
      if (call.gate.at) own = times(own, silu(take(call.gate.row<T>(row, 0) + from + i, count)));
      give(u + i, own, count);
      squares[i / 16 % 4] = fused(own, own, squares[i / 16 % 4]);
    }
    const float sum = total(plus(plus(squares[0], squares[1]), plus(squares[2], squares[3])));
    const Floats scale = all(1.0f / std::sqrt(sum / static_cast<float>(call.width) + call.eps));
    T* y = static_cast<T*>(call.y) + row * call.groups * call.width + from;
    for (int64_t i = 0; i < call.width; i += 16) {
      const int64_t count = call.width - i;
      give(y + i, times(times(take(u + i, count), scale), take(call.weight + from + i, count)), count);
    }
  }
};

}  // namespace

int32_t EFFC_AT_LEVEL(gated_norm)(const GatedNormCall& call) {
  const Norm<float> wide{call};
  const Norm<uint16_t> narrow{call};
  const int64_t count = (call.rows + kRows - 1) / kRows;
  return call.is_float ? share(count, call.threads, wide) : share(count, call.threads, narrow);
}

#if EFFC_LEVEL == 0
EFFC_TABLE(gated_norm, GatedNormCall)

EFFC_API int32_t effc_gated_norm(int32_t level, const void* x, int64_t x_row, const void* gate,
                                 int64_t gate_row, const float* weight, void* y, int64_t rows,
                                 int64_t groups, int64_t width, float eps, int32_t is_float,
                                 int32_t threads) {
  const auto body = gated_norm_at(level);
  if (!body || rows < 0 || groups < 1 || width < 1) return kArguments;
  return body(GatedNormCall{{x, x_row, 0}, {gate, gate_row, 0}, weight, y, rows, groups, width, eps, is_float,
                            threads});
}
#endif
