// Dense bfloat16 weights, packed so that no product has to rearrange them.
#include "dense.h"

int32_t EFFC_AT_LEVEL(dense_linear)(const LinearCall& call) { return linear<Dense<Bf16>>(call); }
int32_t EFFC_AT_LEVEL(dense_linear_part)(const LinearPart& own) { return linear_part<Dense<Bf16>>(own); }

#if EFFC_LEVEL == 0
EFFC_LINEAR(dense_linear, kDenseBf16)
#endif
