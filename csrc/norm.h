// The arithmetic of norm_act around its sums. With n = (h - mean) * rstd the output is
// act(gain * n + offset), and the derivative in h is rstd (gain d - <gain d> - n <gain d n>), with
// d that in the argument of act and <.> the mean over a group.
#pragma once

#include <cmath>

#include "portable.h"

namespace attr_batch {

template <typename T>
struct Affine {
  T gain, offset;
};

// No scale or shift is the same as zero.
template <typename T>
ATTR_BATCH_HD Affine<T> affine(T weight, T bias, T scale, T shift) {
  const T factor = T(1) + scale;
  return {weight * factor, bias * factor + shift};
}

ATTR_BATCH_HD float inverse_root(float value) { return 1.0f / sqrtf(value); }
ATTR_BATCH_HD double inverse_root(double value) { return 1.0 / sqrt(value); }

}  // namespace attr_batch
