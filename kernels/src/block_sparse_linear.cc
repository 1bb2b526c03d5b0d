// bfloat16 weights kept or dropped 16 outputs by 2 inputs at a time.
#include "block_sparse.h"

int32_t EFFC_AT_LEVEL(block_sparse_linear)(const LinearCall& call) { return linear<Blocks>(call); }
int32_t EFFC_AT_LEVEL(block_sparse_linear_part)(const LinearPart& own) { return linear_part<Blocks>(own); }

#if EFFC_LEVEL == 0
EFFC_LINEAR(block_sparse_linear, kBlockBf16)
#endif
