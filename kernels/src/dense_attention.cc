// Decode attention over a whole cache, in the same order of tiles as the sparse one.
#include "attention.h"

int32_t EFFC_AT_LEVEL(dense_attention)(const AttentionCall& call) { return attention<DenseTiles>(call); }

#if EFFC_LEVEL == 0
EFFC_ATTENTION(dense_attention)
#endif
