// Levels of instruction sets. Every kernel source is compiled once per level, with that level's flags and
// EFFC_LEVEL_NAME; the portable compilation also holds the table that picks one at run time.
//
// Everything a level's compilation defines is in an anonymous namespace or carries the level's name. An
// inline function with linkage would be merged by the linker, which may keep the copy that needs AVX-512.
#pragma once
#include <cstdint>

#define EFFC_API extern "C" __attribute__((visibility("default")))

// kAmxModel runs the AMX sources over tile instructions written in plain C++: for tests, never chosen.
enum Level : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxModel, kNeon, kLevels };

// What an exported function answers; `native.py` has the sentences.
enum Status : int32_t {
  kOk, kNoMemory, kShort, kMagic, kOrder, kVersion, kKind, kSizes, kCut, kSections, kHash, kOffsets, kCounts,
  kNotFinite, kArguments, kTooLong, kBusy, kCancelled, kNoThreads, kNoWayBack
};

#define EFFC_JOIN_(a, b) a##_##b
#define EFFC_JOIN(a, b) EFFC_JOIN_(a, b)
#define EFFC_AT_LEVEL(name) EFFC_JOIN(name, EFFC_LEVEL_NAME)

#ifdef EFFC_HAVE_AVX2
#define EFFC_AVX2(name) name##_avx2
#else
#define EFFC_AVX2(name) nullptr
#endif
#ifdef EFFC_HAVE_AVX512
#define EFFC_AVX512(name) name##_avx512
#else
#define EFFC_AVX512(name) nullptr
#endif
#ifdef EFFC_HAVE_AVX512_BF16
#define EFFC_AVX512_BF16(name) name##_avx512_bf16
#else
#define EFFC_AVX512_BF16(name) nullptr
#endif
#ifdef EFFC_HAVE_AMX
#define EFFC_AMX(name) name##_amx
#else
#define EFFC_AMX(name) nullptr
#endif
#ifdef EFFC_LACKS_AMX_MODEL
#define EFFC_AMX_MODEL(name) nullptr
#else
#define EFFC_AMX_MODEL(name) name##_amx_model
#endif
#ifdef EFFC_HAVE_NEON
#define EFFC_NEON(name) name##_neon
#else
#define EFFC_NEON(name) nullptr
#endif

// Declares `name` at every level and makes `name_at(level)`: the body for a level, null where none was built.
#define EFFC_TABLE(name, Call)                                                                              \
  int32_t name##_portable(const Call&);                                                                     \
  int32_t name##_avx2(const Call&);                                                                         \
  int32_t name##_avx512(const Call&);                                                                       \
  int32_t name##_avx512_bf16(const Call&);                                                                  \
  int32_t name##_amx(const Call&);                                                                          \
  int32_t name##_amx_model(const Call&);                                                                    \
  int32_t name##_neon(const Call&);                                                                         \
  using name##_fn = int32_t (*)(const Call&);                                                               \
  static name##_fn name##_at(int32_t level) {                                                               \
    static constexpr name##_fn table[kLevels] = {name##_portable,        EFFC_AVX2(name), EFFC_AVX512(name), \
                                                 EFFC_AVX512_BF16(name), EFFC_AMX(name),                     \
                                                 EFFC_AMX_MODEL(name),   EFFC_NEON(name)};                   \
    return level >= 0 && level < kLevels ? table[level] : nullptr;                                          \
  }
