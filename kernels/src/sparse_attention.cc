// Decode attention over a cache of which small keys and values are not stored.
#include "attention.h"

int32_t EFFC_AT_LEVEL(sparse_attention)(const AttentionCall& call) { return attention<SparseTiles>(call); }

#if EFFC_LEVEL == 0
EFFC_ATTENTION(sparse_attention)
#endif
