// The transforms of Winograd's minimal filtering F(4x4, 3x3): a 3x3 convolution of a 6x6 patch
// gives 4x4 outputs with 36 multiplications per channel pair instead of 144. Lavin, Gray, "Fast
// algorithms for convolutional neural networks" (CVPR 2016), section 4; points 0, +-1, +-2,
// infinity.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A
//
// Each function does one dimension of a transform on vectors `V` of channels.
#pragma once

#include "../portable.h"

namespace attr_batch::cpu {

constexpr int kTileOut = 4, kTileIn = 6, kPoints = kTileIn * kTileIn;

// B^T: six inputs to six points.
template <typename V>
ATTR_BATCH_HD void input_points(const V d[6], V out[6]) {
  const V even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const V even2 = d[4] - d[2], odd2 = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = even2 + odd2;
  out[4] = even2 - odd2;
  out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// G: three weights to six points.
template <typename V>
ATTR_BATCH_HD void weight_points(const V g[3], V out[6]) {
  const V ends = g[0] + g[2], ends4 = g[0] + 4.0f * g[2];
  out[0] = 0.25f * g[0];
  out[1] = (-1.0f / 6.0f) * (ends + g[1]);
  out[2] = (-1.0f / 6.0f) * (ends - g[1]);
  out[3] = (1.0f / 24.0f) * (ends4 + 2.0f * g[1]);
  out[4] = (1.0f / 24.0f) * (ends4 - 2.0f * g[1]);
  out[5] = g[2];
}

// A^T: six points to four outputs.
template <typename V>
ATTR_BATCH_HD void output_points(const V m[6], V out[4]) {
  const V sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const V sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum1 + sum2;
  out[1] = difference1 + 2.0f * difference2;
  out[2] = sum1 + 4.0f * sum2;
  out[3] = difference1 + 8.0f * difference2 + m[5];
}

// A: four gradients of outputs to six points.
template <typename V>
ATTR_BATCH_HD void gradient_points(const V y[4], V out[6]) {
  const V even = y[0] + y[2], odd = y[1] + y[3];
  const V even4 = y[0] + 4.0f * y[2], odd4 = 2.0f * y[1] + 8.0f * y[3];
  out[0] = y[0];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = even4 + odd4;
  out[4] = even4 - odd4;
  out[5] = y[3];
}

// G^T: six points to the gradients of three weights.
template <typename V>
ATTR_BATCH_HD void weight_gradients(const V m[6], V out[3]) {
  const V sum1 = (1.0f / 6.0f) * (m[1] + m[2]), difference1 = (1.0f / 6.0f) * (m[2] - m[1]);
  const V sum2 = (1.0f / 24.0f) * (m[3] + m[4]), difference2 = (1.0f / 24.0f) * (m[3] - m[4]);
  out[0] = 0.25f * m[0] - sum1 + sum2;
  out[1] = difference1 + 2.0f * difference2;
  out[2] = m[5] - sum1 + 4.0f * sum2;
}

}  // namespace attr_batch::cpu
