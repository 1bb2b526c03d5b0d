// Weights into the packed form by the library's own source.
#pragma once
#include "packed.h"

// `head` has kind, n and k. Into `buffer` of `most` bytes; `offsets` [blocks + 1], `scales` [16 * blocks].
int32_t pack_weight(Header& head, const float* w, int64_t* offsets, float* scales, uint8_t* buffer,
                    int64_t most);
