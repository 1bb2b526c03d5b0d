// Which blocks of a packed weight each part of a job takes.
#pragma once
#include "packed.h"

namespace {

// Equal bytes, not equal counts, since reading the stream is what takes the time. `bounds` are those of all
// parts where they were worked out before: searching reads cold memory at every step.
struct Share {
  int64_t from, to;
  Share(const Packed& packed, int part, int parts, const int64_t* bounds = nullptr)
      : from(bounds ? bounds[part] : bound(packed, part, parts)),
        to(bounds ? bounds[part + 1] : bound(packed, part + 1, parts)) {}
  static int64_t bound(const Packed& packed, int part, int parts) {
    const int64_t blocks = packed.head.blocks;
    if (part == 0 || part == parts) return part ? blocks : 0;
    const double wanted = double(packed.offset(blocks)) * part / parts;
    int64_t low = 0, high = blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (packed.offset(middle) < wanted) low = middle + 1; else high = middle;
    }
    return low;
  }
};

}  // namespace
