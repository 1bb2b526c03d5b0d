// exp, 16 numbers at a time.
#pragma once
#include "vec.h"

namespace {

// exp of 16 numbers <= 0, to 2e-7 of the result; what lies below -87 counts as -87.
inline Floats exponentials(Floats x) {
  const Floats clipped = greater(x, all(-87.0f));
  const Floats shifted = plus(times(clipped, all(1.44269504f)), all(12582912.0f));
  const Floats whole = plus(shifted, all(-12582912.0f));  // to the nearest integer
  const Floats near = multiply_add(whole, all(-0.693359375f), clipped);
  const Floats rest = multiply_add(whole, all(2.12194440e-4f), near);
  Floats sum = all(1.9875691500e-4f);
  for (float next :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = multiply_add(sum, rest, all(next));
  return times(plus(multiply_add(sum, times(rest, rest), rest), all(1.0f)), power2(whole));
}

}  // namespace
