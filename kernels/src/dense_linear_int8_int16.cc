// Dense int8 weights with a scale per output; activations are rounded to 16 bits row by row.
#include "dense.h"

int32_t EFFC_AT_LEVEL(dense_linear_int8_int16)(const LinearCall& call) { return linear<Dense<Int8Int16>>(call); }
int32_t EFFC_AT_LEVEL(dense_linear_int8_int16_part)(const LinearPart& own) {
  return linear_part<Dense<Int8Int16>>(own);
}

#if EFFC_LEVEL == 0
EFFC_LINEAR(dense_linear_int8_int16, kDenseInt8Int16)
#endif
