// Powers of two of vectors.
#pragma once

#include "simd.h"

namespace efflm {
namespace {

// 2^x of x below 127, to 2e-7 relative; exactly 0 below -126.5; NaN of NaN.
EFFLM_INLINE Floats exp2(Floats x) {
  const Floats least = splat(-127.0f), round = splat(12582912.0f);  // 1.5 * 2^23: sums with it are rounded to integers
  x = x < least ? least : x;
  const Floats shifted = x + round;
  const Floats f = x - (shifted - round);  // in [-1/2, 1/2]
  const Ints power = (Ints)shifted << 23;  // the integer stands in the lowest bits
  // The Taylor series of 2^f at 0: its next term is below 2e-8.
  Floats p = splat(1.5403530393381608e-4f);
  p = p * f + splat(1.3333558146428443e-3f);
  p = p * f + splat(9.618129107628477e-3f);
  p = p * f + splat(5.550410866482158e-2f);
  p = p * f + splat(0.2402265069591007f);
  p = p * f + splat(0.6931471805599453f);
  p = p * f + splat(1.0f);
  return p * (Floats)(power + splat(int32_t(127 << 23)));
}

}  // namespace
}  // namespace efflm
