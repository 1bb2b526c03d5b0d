// Sparse int8 weights with a scale per output; activations are rounded to int8 row by row.
#include "sparse.h"

int32_t EFFC_AT_LEVEL(sparse_linear_int8)(const LinearCall& call) { return linear<Sparse<Int8>>(call); }
int32_t EFFC_AT_LEVEL(sparse_linear_int8_part)(const LinearPart& own) {
  return linear_part<Sparse<Int8>>(own);
}

#if EFFC_LEVEL == 0
EFFC_LINEAR(sparse_linear_int8, kSparseInt8)
#endif
