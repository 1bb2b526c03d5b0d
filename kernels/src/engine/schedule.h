// Which thread does what and when: the steps of a plan in levels, between which all threads meet.
//
// With few rows the steps that work row by row are mirrored: every thread does all of them in memory of its
// own, since waiting for a share would take longer. With many rows each thread takes a part of the rows.
#pragma once
#include <vector>

#include "plan.h"

namespace engine {

enum class Work { kRows, kPrepare, kMultiply, kMix, kAppend, kAttend, kScan };  // as `Spent` has them

struct Task {
  Work work;
  int32_t step;      // whose
  int32_t prepared;  // kPrepare and kMultiply: the buffer of x in the form in which a weight meets it
};

// Steps that a product does with its own sums, so that none of them reads and writes memory for itself: an activation,
// then a product and a sum with other registers. Numbers of steps or registers, -1: none.
struct Fused {
  int32_t act = -1, times = -1, plus = -1;
  int32_t to = -1;  // the register that the last one writes
};

// Rows of float32 in one of two kinds of memory, `floats` of each row apart.
struct Buffer {
  int64_t floats = 0, at = 0;  // of a row; where it begins, in floats of a row
  bool shared = true;          // or each thread has its own
  int32_t first = -1, last = -1;  // levels in which it is used
};

// A register is some columns of a buffer.
struct View {
  int32_t buffer;
  int64_t column;
};

class Schedule {
 public:
  Schedule() = default;
  Schedule(const Plan& plan, bool mirrored, bool adapted);

  bool mirrored = false;
  bool adapted = false;  // updates stand behind products: no product takes over a step, and its x stays until it is done
  std::vector<std::vector<Task>> levels;
  std::vector<Fused> fused;     // of the steps that are products
  std::vector<View> views;      // of the registers
  std::vector<Buffer> buffers;  // of the registers that are no views of others, then the prepared ones
  std::vector<int32_t> carried; // buffers that are made before the tail and used in it
  int32_t tail = 0;             // from this level on only the rows whose logits are wanted count
  int64_t shared_floats = 0, own_floats = 0;  // of a row

 private:
  struct Prepared {
    int32_t x, tail, words, form, buffer, level;  // form: 0 bfloat16, 1 int8 or int16, else int8 by so many inputs
  };
  void fuse(const Plan& plan);
  void lay_views(const Plan& plan);
  void order(const Plan& plan);
  void add_linear(const Plan& plan, int32_t step);
  void add_attention(const Plan& plan, int32_t step);
  void add_whole(const Plan& plan, int32_t step, Work work);
  void add(Work work, int32_t step, int32_t prepared, int32_t level);
  int32_t ready(int32_t reg, bool by_rows) const;
  void use(int32_t reg, int32_t level);
  void make(int32_t reg, int32_t level, bool by_rows);
  void place();

  std::vector<Prepared> prepared_;
  std::vector<bool> absorbed_;   // steps that a product does
  std::vector<bool> in_place_;   // products that write where `times` is
  std::vector<bool> of_product_; // registers that a product writes
  std::vector<int32_t> made_;    // of each buffer: the level, -1 not yet
  std::vector<bool> by_rows_;    // of each buffer: by a step that works row by row
};

}  // namespace engine
