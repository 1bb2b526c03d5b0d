// Reads a buffer and does nothing with it: the bound that a kernel's time is compared with.
#include <algorithm>

#include "levels.h"
#include "threads.h"
#include "vec.h"

struct ReadCall {
  const uint8_t* at;
  int64_t bytes;
  int32_t threads;
};

namespace {

void read_part(int part, int parts, void* context) {
  const ReadCall& call = *static_cast<const ReadCall*>(context);
  const int64_t blocks = call.bytes / 256;
  Ints sums[4] = {no_ints(), no_ints(), no_ints(), no_ints()};
  for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const uint8_t* at = call.at + 256 * i + 64 * j;
      ahead(at + 8192);
      sums[j] = plus(sums[j], load_ints(reinterpret_cast<const int32_t*>(at)));
    }
  }
  alignas(64) int32_t all[16];
  store(all, plus(plus(sums[0], sums[1]), plus(sums[2], sums[3])));
  __asm__ volatile("" : : "g"(all) : "memory");  // or the loop would be dropped
}

}  // namespace

int32_t EFFC_AT_LEVEL(read)(const ReadCall& call) {
  effc_parallel(std::max(1, call.threads), read_part, const_cast<ReadCall*>(&call));
  return kOk;
}

#if EFFC_LEVEL == 0
EFFC_TABLE(read, ReadCall)

EFFC_API int32_t effc_read(int32_t level, const uint8_t* at, int64_t bytes, int32_t threads) {
  const auto body = read_at(level);
  return body && bytes >= 0 ? body(ReadCall{at, bytes, threads}) : kArguments;
}
#endif
