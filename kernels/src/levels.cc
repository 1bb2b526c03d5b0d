// What this processor and this operating system can run. Levels are ordered: a kernel takes the highest
// level that it has a body for and that is not above the machine's.
#include <cstdint>

#define EFFC_API extern "C" __attribute__((visibility("default")))

enum Level : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__)
static int32_t detect() {
  __builtin_cpu_init();  // asks CPUID and XGETBV: what the system does not save, it does not report
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
  return kPortable;
}
#else
static int32_t detect() { return kPortable; }
#endif

EFFC_API int32_t effc_level() {
  static const int32_t level = detect();
  return level;
}
