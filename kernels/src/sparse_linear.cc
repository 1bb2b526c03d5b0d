// Sparse bfloat16 weights as tile bitmaps.
#include "sparse.h"

int32_t EFFC_AT_LEVEL(sparse_linear)(const LinearCall& call) { return linear<Sparse<Bf16>>(call); }
int32_t EFFC_AT_LEVEL(sparse_linear_part)(const LinearPart& own) { return linear_part<Sparse<Bf16>>(own); }

#if EFFC_LEVEL == 0
EFFC_LINEAR(sparse_linear, kSparseBf16)
#endif
