// The arithmetic of one solver step, in the order that defines its bits:
//   x0   = clamp(k[0] * sample + k[1] * output, -clip, clip)
//   next = (((k[2] * sample + k[3] * x0) + k[4] * history[0]) + ...) + k[4 + H] * noise
#pragma once

#include <cstdint>

#include "portable.h"

namespace attr_batch {

constexpr int kMaxHistory = 3;

ATTR_BATCH_HD float predict_x0(float k0, float sample, float k1, float output, float clip) {
  const float x0 = k0 * sample + k1 * output;
  // Comparisons, not fmin and fmax: a NaN must come through for the caller to see.
  const float below = x0 < -clip ? -clip : x0;
  return below > clip ? clip : below;
}

ATTR_BATCH_HD float first_terms(float k2, float sample, float k3, float x0) {
  return k2 * sample + k3 * x0;
}

ATTR_BATCH_HD float add_term(float sum, float k, float value) { return sum + k * value; }

// Where logical element `e` of a (C, H, W) sample lies in memory; pixels = H * W.
ATTR_BATCH_HD int64_t offset_channels_last(int64_t e, int64_t channels, int64_t pixels) {
  return (e % pixels) * channels + e / pixels;
}

}  // namespace attr_batch
