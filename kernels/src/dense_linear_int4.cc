// Dense int4 weights with a scale per output and group of inputs; activations are rounded to int8 by groups.
#include "int4.h"

#if EFFC_TILES
using ManyInt4 = Int4Tiles;
#else
using ManyInt4 = Int4;
#endif

int32_t EFFC_AT_LEVEL(dense_linear_int4)(const LinearCall& call) { return linear<Int4, ManyInt4>(call); }
int32_t EFFC_AT_LEVEL(dense_linear_int4_part)(const LinearPart& own) { return linear_part<Int4, ManyInt4>(own); }

#if EFFC_LEVEL == 0
EFFC_LINEAR(dense_linear_int4, kDenseInt4)
#endif
