// What steps along a sequence know of the tokens before: one state per step and sequence, of a fixed size.
//
// A state can't be taken back as keys and values can, so there are two of each: a call reads one and writes
// the other, and only when it has succeeded do they change places.
#pragma once
#include <vector>

#include "plan.h"

namespace engine {

class States {
 public:
  States() = default;
  ~States();
  States(const States&) = delete;
  bool reserve(const Plan& plan);  // false: no room
  bool any() const { return !starts_.empty(); }
  // A call comes to tokens of a sequence: whether it has come to earlier ones of it already.
  bool move_on(int64_t sequence);
  void settle(bool succeeded);     // the call has ended
  void forget(int64_t sequence);
  // The state before all tokens of this call, and where that after them goes.
  const float* before(int64_t sequence, int32_t state) const { return at(sequence, state, side_[sequence]); }
  float* after(int64_t sequence, int32_t state) const { return at(sequence, state, !side_[sequence]); }

 private:
  float* at(int64_t sequence, int32_t state, int side) const {
    return memory_ + (2 * sequence + side) * floats_ + starts_[state];
  }

  std::vector<int64_t> starts_;       // of each state, in floats
  std::vector<uint8_t> side_, moved_; // of each sequence
  int64_t floats_ = 0, bytes_ = 0;    // floats: of all states of a sequence
  float* memory_ = nullptr;
};

}  // namespace engine
