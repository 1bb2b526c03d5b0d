// The engine as C: nothing thrown leaves this file.
#include <new>
#include <system_error>

#include "engine.h"

using engine::Engine;

namespace {

template <class Body>
int32_t caught(Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::system_error&) {
    return kNoThreads;
  } catch (...) {
    return kArguments;
  }
}

}  // namespace

// Raised with every change of what Python hands over; a library of other sources would read it wrongly.
EFFC_API int32_t effc_engine_layout() { return 10; }

// `plan` and all it points to has been checked by `engine_plan.py`; the weights stay where they are.
EFFC_API int32_t effc_engine_create(const Plan* plan, Engine** made) {
  return caught([&] {
    *made = new Engine(*plan);
    return kOk;
  });
}

EFFC_API int32_t effc_engine_free(Engine* own) {
  return caught([&] {
    delete own;
    return kOk;
  });
}

EFFC_API int32_t effc_engine_run(Engine* own, int64_t count, const int64_t* ids, const int64_t* sequences,
                                 int64_t wanted_count, const int64_t* wanted, const int32_t* adapters,
                                 float* logits) {
  return caught([&] { return own->run({ids, sequences, count, wanted, wanted_count, adapters}, logits); });
}

// Tokens of sources: what the encoder makes of them is recalled by the tokens that follow in `run`.
EFFC_API int32_t effc_engine_encode(Engine* own, int64_t count, const int64_t* ids,
                                    const int64_t* sequences) {
  return caught([&] { return own->encode({ids, sequences, count, nullptr, 0}); });
}

// `updates` and their factors have been checked by `engine_adapters.py`; the factors stay where they are.
EFFC_API int32_t effc_engine_add_adapter(Engine* own, int32_t count, const engine::LowRank* updates, int32_t* number) {
  return caught([&] { return own->add_adapter(updates, count, *number); });
}

EFFC_API int32_t effc_engine_remove_adapter(Engine* own, int32_t number) {
  return caught([&] { return own->remove_adapter(number); });
}

EFFC_API int32_t effc_engine_forget(Engine* own, int64_t sequence, int64_t length) {
  return caught([&] { return own->forget(sequence, length); });
}

EFFC_API int32_t effc_engine_length(const Engine* own, int64_t sequence, int64_t* length) {
  if (sequence < 0 || sequence >= own->sequences()) return kArguments;
  *length = own->length(sequence);
  return kOk;
}

// The same of its source.
EFFC_API int32_t effc_engine_source(const Engine* own, int64_t sequence, int64_t* length) {
  if (sequence < 0 || sequence >= own->sequences()) return kArguments;
  *length = own->source(sequence);
  return kOk;
}

EFFC_API int32_t effc_engine_cancel(Engine* own) {
  own->cancel();
  return kOk;
}

// `spent`: 8 sums in nanoseconds, as `Spent` has them.
EFFC_API int32_t effc_engine_profile(Engine* own, int64_t (*spent)[engine::kSpents], int32_t on) {
  own->profile(*spent, on != 0);
  return kOk;
}
