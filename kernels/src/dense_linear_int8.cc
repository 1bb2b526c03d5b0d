// Dense int8 weights with a scale per output; activations are rounded to int8 row by row.
#include "dense.h"

int32_t EFFC_AT_LEVEL(dense_linear_int8)(const LinearCall& call) { return linear<Dense<Int8>>(call); }
int32_t EFFC_AT_LEVEL(dense_linear_int8_part)(const LinearPart& own) { return linear_part<Dense<Int8>>(own); }

#if EFFC_LEVEL == 0
EFFC_LINEAR(dense_linear_int8, kDenseInt8)
#endif
