// What the compilations of each level offer to the engine.
#pragma once
#include "../linear_call.h"
#include "plan.h"

namespace engine {

// A step that works row by row, on rows from..until-1.
struct RowsCall {
  const Step* step;
  const Weight* weights;
  const float *x, *y;
  float* to;
  int64_t x_stride, y_stride, to_stride;
  int64_t x_width, width;  // of x and of `to`
  int64_t from, until;
  int64_t first, last;  // columns of `to` that a part of the threads computes: scores
  const int64_t *ids, *positions;
};

// Neighbouring tokens of one sequence. All of them are in the cache already.
struct Run {
  int64_t first, count;       // rows
  int64_t position, sequence; // of the first
  int64_t continued;          // states that this call has moved on already are moved on further
  int64_t source;             // tokens that the encoder has read for the sequence
};

// A piece of an item of attention that several threads share, and how many of them are done.
struct Pieces {
  float* memory;                  // [threads][2][kPieceFloats]
  struct alignas(64) Count { int32_t done; } *counts;  // [threads]
};
constexpr int64_t kMostHead = 512;  // dimensions
constexpr int64_t kMostItemRows = 16;
constexpr int64_t kPieceFloats = kMostItemRows * (kMostHead + 2) + 16;

// New tokens of a slot into the cache, or one thread's part of the attention of all rows over it.
struct AttendCall {
  const Step* step;
  const float *q, *k, *v, *sinks, *slopes;
  const float* distances;  // [heads, distance_count] that scores gain, or null
  int64_t distance_count;
  float* to;
  int64_t q_stride, k_stride, v_stride, to_stride;
  const Run* runs;
  int64_t run_count;
  uint8_t* const* rooms;  // of each sequence: the blocks of the slot's first head
  int64_t head_bytes, block_bytes;
  int32_t numbers;        // a KvNumbers
  Pieces pieces;
  int32_t append, batch_invariant, part, parts;
};

}  // namespace engine

using EngineRows = engine::RowsCall;
using EngineAttend = engine::AttendCall;
