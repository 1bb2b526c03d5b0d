// Apart from the products, for it is compiled without AVX-512: the emulator (Bochs 3.0) gives zeros for a
// vpcompressw whose mask is all ones. Packing is tested at every level elsewhere; here it only makes weights.
#include "packing.h"

#include "pack.cc"

int32_t pack_weight(Header& head, const float* w, int64_t* offsets, float* scales, uint8_t* buffer,
                    int64_t most) {
  std::memcpy(head.magic, "effcpack", 8);
  head.order = kByteOrder, head.version = kFormat, head.kept = 0;
  if (const int32_t status = effc_lay_out(head, 0)) return status;
  PackCall call{w, head.k, 1, 1, &head, offsets, scales, nullptr};
  if (const int32_t status = EFFC_AT_LEVEL(pack)(call)) return status;
  if (head.bytes > most) return kNoMemory;
  std::memset(buffer, 0, head.bytes);
  call.buffer = buffer;
  return EFFC_AT_LEVEL(pack)(call);
}
