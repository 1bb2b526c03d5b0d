// What scans and convolutions along a sequence are called with, by exported functions and by `engine/`.
//
// `parts` 0: all of it, in `threads` threads of the kernel's own. Else the share number `part` of as many, by
// the thread that calls; which share a head or a channel is in depends on `parts` alone.
#pragma once
#include <cstdint>

// A tensor whose innermost axis is contiguous: where it begins, elements from batch to batch, step to step.
struct Rows {
  const void* at;
  int64_t batch, step;

  template <class T>
  [[gnu::always_inline]] const T* row(int64_t b, int64_t t) const {  // no copy that a linker could merge
    return static_cast<const T*>(at) + b * batch + t * step;
  }
};

// The positions first .. last - 1 of a sequence are live; outside them y is 0 and states stand still.
struct Live {
  const int64_t* bounds;  // [batches, 2], or null where all positions are live
  int64_t length;

  [[gnu::always_inline]] int64_t first(int64_t b) const { return bounds ? bounds[2 * b] : 0; }
  [[gnu::always_inline]] int64_t last(int64_t b) const { return bounds ? bounds[2 * b + 1] : length; }
  [[gnu::always_inline]] bool sound(int64_t batches) const {
    for (int64_t b = 0; bounds && b < batches; ++b)
      if (first(b) < 0 || last(b) < first(b) || last(b) > length) return false;
    return true;
  }
};

struct CausalConvCall {
  Rows x;                // [batches, length, channels]
  const float* weight;   // [k, channels], rows `wide` apart
  const float* bias;     // [channels] or null
  const void* before;    // [batches, k - 1, channels] as x, rows `wide` apart: what came before; null: zeros
  void* y;               // [batches, length, channels], rows `wide` apart
  Live live;
  int64_t batches, length, channels, k;
  int32_t is_float, silu, threads;
  int64_t wide;
};

struct SelectiveScanCall {
  Rows x, dt, z;           // [batches, length, channels]; z null: no gate
  int64_t dt_channel;      // elements of dt from channel to channel; more than 1: it lies channel by channel
  Rows b, c;               // [batches, length, n]
  const float *a;          // [channels, n]
  const float *d, *bias;   // [channels] or null
  void* y;                 // [batches, length, channels]
  float* state;            // [batches, channels, n]: before the first live position, then after the last
  Live live;
  int64_t batches, length, channels, n;
  int32_t is_float, softplus, threads;
  int32_t part, parts;
  int32_t in_lanes;        // a and state lie as [16 channels at a time][n][16], zeros behind the last channel
  const float* before;     // in lanes: the state before, if that is not to be read where the next is written
};

struct SsdScanCall {
  Rows x;                 // [batches, length, heads * p]
  Rows dt;                // [batches, length, heads]
  Rows b, c;              // [batches, length, groups * n]
  const float *a;         // [heads]
  const float *d, *bias;  // [heads] or null
  void* y;                // [batches, length, heads * p]
  float* state;           // [batches, heads, p, n]: before the first live position, then after the last
  Live live;
  int64_t batches, length, heads, p, groups, n;
  float least, most;      // bounds of dt
  int32_t is_float, softplus, threads;
  int32_t part, parts;
  int32_t in_lanes;       // state lies as [heads][n][p], n filled up to kStates and p to 16, zeros there
  const float* before;    // in lanes: the state before, if that is not to be read where the next is written
};

struct DeltaRuleCall {
  Rows q, k;            // [batches, length, groups * n]
  Rows v;               // [batches, length, heads * p]
  Rows decay;           // [batches, length, heads], or with by_channel heads * n
  Rows beta;            // [batches, length, heads]
  float *y, *state;     // [batches, length, heads * p]; [batches, heads, n, p]: before, then after
  const float* before;  // the state before, if that is not to be read where the next is written
  int64_t batches, length, heads, groups, n, p;
  int32_t by_channel, threads;
  int32_t part, parts;
};
