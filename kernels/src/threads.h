// Threads and scratch memory. A kernel is told how many parts to make; who runs them is decided here.
#pragma once
#include <cstddef>

// Calls body(part, parts, context) once for every part in 0..parts-1, each possibly in another thread.
void effc_parallel(int parts, void (*body)(int part, int parts, void* context), void* context);

// Memory of the calling thread that is kept between calls, 64-byte aligned; null where there is none.
void* effc_scratch(int slot, size_t bytes);
