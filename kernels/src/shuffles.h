// Shuffles of bytes by table, for levels without instructions that expand and compress.
#pragma once
#include <cstdint>

namespace {

// For 8 mask bits the shuffle that spreads (or gathers) 8 elements; 0x80 makes a zero.
struct Shuffles {
  alignas(16) uint8_t spread2[256][16];
  alignas(16) uint8_t gather2[256][16];
  alignas(16) uint8_t spread1[256][8];
  alignas(16) uint8_t gather1[256][8];
};

constexpr Shuffles make_shuffles() {
  Shuffles s{};
  for (int mask = 0; mask < 256; ++mask) {
    int taken = 0;
    for (int i = 0; i < 8; ++i) {
      s.gather1[mask][i] = s.spread1[mask][i] = 0x80;
      s.gather2[mask][2 * i] = s.gather2[mask][2 * i + 1] = 0x80;
      s.spread2[mask][2 * i] = s.spread2[mask][2 * i + 1] = 0x80;
    }
    for (int i = 0; i < 8; ++i) {
      if (!(mask >> i & 1)) continue;
      s.spread1[mask][i] = static_cast<uint8_t>(taken);
      s.gather1[mask][taken] = static_cast<uint8_t>(i);
      for (int half = 0; half < 2; ++half) {
        s.spread2[mask][2 * i + half] = static_cast<uint8_t>(2 * taken + half);
        s.gather2[mask][2 * taken + half] = static_cast<uint8_t>(2 * i + half);
      }
      ++taken;
    }
  }
  return s;
}
constexpr Shuffles kShuffles = make_shuffles();

}  // namespace
