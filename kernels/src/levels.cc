// What this processor and this operating system can run, and what this library was built with.
#include "levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
// Tiles need the processor, the system (XCR0 bits 17 and 18) and, on Linux, a permission asked for once per
// process. An emulated processor runs all of this but the permission; one with AMX runs the permission, too.
static bool tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  if ((d & (bf16 | tile | int8)) != (bf16 | tile | int8)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE: xgetbv may be asked
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & (3u << 17)) != (3u << 17)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
#endif
  return true;
}

static int32_t detect() {
  __builtin_cpu_init();  // asks CPUID and XGETBV: what the system does not save, it does not report
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2") ||
      !__builtin_cpu_supports("popcnt"))
    return kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vbmi2"))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return kAvx512;
  return tiles() ? kAmx : kAvx512Bf16;
}
#elif defined(__aarch64__) && defined(__linux__)
static int32_t detect() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? kNeon : kPortable; }
#else
static int32_t detect() { return kPortable; }
#endif

static bool built(int32_t level) {
  switch (level) {
    case kPortable:
      return true;
#ifndef EFFC_LACKS_AMX_MODEL
    case kAmxModel:
      return true;
#endif
#ifdef EFFC_HAVE_AVX2
    case kAvx2:
      return true;
#endif
#ifdef EFFC_HAVE_AVX512
    case kAvx512:
      return true;
#endif
#ifdef EFFC_HAVE_AVX512_BF16
    case kAvx512Bf16:
      return true;
#endif
#ifdef EFFC_HAVE_AMX
    case kAmx:
      return true;
#endif
#ifdef EFFC_HAVE_NEON
    case kNeon:
      return true;
#endif
  }
  return false;
}

// The highest level of processor and system, whatever was built.
EFFC_API int32_t effc_machine_level() {
  static const int32_t level = detect();
  return level;
}

EFFC_API int32_t effc_built(int32_t level) { return built(level); }
