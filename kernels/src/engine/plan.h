// The plan of a model as `engine_plan.py` lays it out after it has checked every register, size and weight.
// A register is float32 rows [tokens, width]; every step writes one.
#pragma once
#include <cstdint>

#include "../packed.h"

enum Op : int32_t {
  kEmbedding, kPositions, kAngles, kNorm, kLinear, kColumns, kPlace, kRotary, kAttention, kRemember,
  kRecall, kAct, kAdd, kMul, kScale, kShift, kSoftcap, kClip, kXielu, kMean, kAddVector, kMulVector, kScores,
  kRoute, kExperts, kConvolve, kSsd, kSelective, kDelta
};
enum Norm : int32_t { kRms, kLayer };
enum Act : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid, kTanh, kQuickGelu, kSoftplus, kSquare,
                     kSqrt, kReciprocal, kExp };
enum Router : int32_t { kSoftmax, kLogistic, kNear, kLogits };
enum Form : int32_t { kFloat32 = 16, kBfloat16 };  // of a weight that is not packed; packed ones have a Kind

struct Weight {
  const uint8_t* at;
  int64_t bytes, n, k;  // n rows of k numbers; a vector is one row
  int32_t form, zero;
};

// What a step does not use is -1 (registers, weights) or 0.
struct Step {
  int32_t op, kind;              // kind: a Norm, an Act or a Router; of scans whether time steps go through
                                 // softplus, of experts whether what they give is summed, of a delta rule
                                 // whether each key channel has a decay of its own
  int32_t to, x, y, z;           // registers; attention: x q, y k, z v; remember: y k, z v, and `to` is -1;
                                 // recall: x q; rotary: y angles; scans: y dt, z B;
                                 // experts: y those chosen; delta: x v, y decay, z k
  int32_t c, gate;               // registers of scans; delta: c q, gate beta
  int32_t weight, bias, skip;    // embedding, positions, angles: weight is the table; attention: the sinks;
                                 // as skip the slopes by distance, as bias what scores gain at each
                                 // distance, a row of a head; convolve: the filters; scans: A,
                                 // and as skip D; route: what is added to choose; experts: the first of
                                 // `count` weights, and a bias of each
  int32_t slot, heads, kv_heads, head_dim, value_dim, window;  // window 0: none; recall: the slot
                                                               // is one of the encoder
  int32_t start, block, stride, count;  // columns and place; attention: count 1 sees the tokens that follow
                                        // too; route: count chosen, from `block` of `group`
                                        // groups, judged by their best `stride`; experts: block chosen,
                                        // and `stride` from the x of one to that of the next
  int32_t group, rotary_dim, interleaved;  // route: interleaved says that weights are divided by their sum
  int32_t state, states;         // number of the state; of scans how many a channel has. ssd and delta: kv_heads
                                 // groups
  float number, scale, softcap, most;  // number: eps, by, at, the least; softcap 0: none;
                                       // xielu: most, scale and number of the square, the exponential and x
};
static_assert(sizeof(Step) == 120, "engine_plan.py writes it");

enum KvNumbers : int32_t { kKvBf16, kKvInt8 };  // of keys and values in the cache

struct Slot {
  int32_t kv_heads, head_dim, value_dim, numbers;
};

// Steps that keep a state of each sequence, which stands for all tokens before.
inline bool has_state(const Step& step) { return step.op >= kConvolve; }

struct Plan {
  const Step* steps;
  const int32_t* widths;  // of the registers
  const Weight* weights;
  const Slot* slots;
  int32_t step_count, register_count, weight_count, slot_count;
  int32_t logits;         // register
  int32_t level, threads, sequences;
  int32_t batch_invariant;  // a row's logits do not depend on the rows beside it
  int64_t context;
  const Plan* encoder;    // whose keys and values are recalled, of sources; null: none. Its logits are -1
};
