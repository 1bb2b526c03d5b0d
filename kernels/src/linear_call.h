// What a linear kernel is called with.
#pragma once
#include <cstdint>

struct ActCall {
  int32_t kind;
  float* values;  // in place
  int64_t count;  // a multiple of 16
};
// What follows a product while its sums are in registers: y = act(x @ w.T + bias) * times + plus, each where there is one.
struct Epilogue {
  int32_t (*act)(const ActCall&) = nullptr;
  int32_t kind = 0;
  const float *times = nullptr, *plus = nullptr;  // [rows, n], `stride` floats between rows; `times` may be y
  int64_t times_stride = 0, plus_stride = 0;
};

struct LinearCall {
  const uint8_t* packed;   // checked
  const void* x;           // [rows, k], last dimension contiguous, `stride` elements between rows
  const void* bias;        // [n] or null
  void* y;                 // [rows, n] as x, `y_stride` elements between rows; 0: n
  int64_t rows, stride;
  int32_t x_float, bias_float;  // float32, else bfloat16
  int32_t threads;
  const int64_t* bounds = nullptr;  // [parts + 1] blocks of each part, or null: worked out
  const Epilogue* epilogue = nullptr;
  int64_t y_stride = 0;
};

// One thread's part of a product, for a caller with threads and memory of its own (`engine/`). All parts
// prepare x, and when all have, all multiply. At most kLinearRows rows; k, the arithmetic and whether it is a
// weight of blocks say how x is prepared, so weights that agree in them share it.
enum Stage : int32_t { kPrepare, kMultiply, kReadRow };
struct LinearPart {
  LinearCall call;
  Stage stage;
  int32_t part, parts;
  uint8_t *rows, *words;  // of all parts: for each row, or for 8 or 16 if fewer, its `prepared_bytes` in tiles
  float* scales;          // likewise, one for each
  uint8_t* panels;        // kPanelBytes for each part
  int64_t row;            // kReadRow: the output whose weights go to y, float32
  int32_t batch_invariant;  // a row's sums do not depend on how many rows there are
};
constexpr int64_t kLinearRows = 512, kPanelBytes = 315392;
