// The logistic function and SiLU, with an exponential of our own: libraries differ in the last bits
// and vectorise on some platforms only (portable.h). No branches, so that loops vectorise.
//
// Relative error of sigmoid and silu below 2e-7 down to z = -87, absolute error of silu_derivative
// below 3e-7; the right limits at both infinities, and NaN stays NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace attr_batch {

// exp(-z) for z in [-89, 80], infinity below -88.73. With n = round(-z / ln 2) and
// r = z + n ln 2 it is 2 exp(-r) 2^(n - 1), the factor 2 for the sake of n = 128.
ATTR_BATCH_HD float exp_negated(float z) {
  constexpr float kToInteger = 0x1.8p23f;  // a sum with it has the integer in its lowest bits
  constexpr float kLog2E = 0x1.715476p0f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * high is exact
  const float shifted = z * -kLog2E + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (z + n * kLn2High) + n * kLn2Low;  // |r| <= ln 2 / 2
  const float r2 = r * r;
  // 2 (exp(-r) - 1 + r) / r^2, Remez fit, error of the sum 2e-9; in pairs, for a shorter wait.
  const float first = 0.9999998f - r * 0.3333284f, second = 0.08333645f - r * 0.016749632f;
  const float tail = first + r2 * (second + r2 * 0.0027673692f);
  const float power = from_bits((to_bits(shifted) << 23) + (126u << 23));  // 2^(n - 1)
  return (2.0f + (r2 * tail - 2.0f * r)) * power;
}

// float64 is there to check derivatives numerically, not for speed.
ATTR_BATCH_HD double exp_negated(double z) { return exp(-z); }

// Past these bounds the functions have reached their limits; within them nothing is inf * 0.
// Comparisons, not fmin and fmax: a NaN must come through.
template <typename T>
ATTR_BATCH_HD T bound_below(T z) {
  constexpr T kLow = sizeof(T) == sizeof(float) ? -89 : -710;
  return z < kLow ? kLow : z;
}

template <typename T>
ATTR_BATCH_HD T bound_above(T z) {
  constexpr T kHigh = 80;
  return z > kHigh ? kHigh : z;
}

template <typename T>
ATTR_BATCH_HD T sigmoid(T z) {
  return T(1) / (T(1) + exp_negated(bound_above(bound_below(z))));
}

template <typename T>
ATTR_BATCH_HD T silu(T z) {
  const T x = bound_below(z);
  return x / (T(1) + exp_negated(bound_above(x)));
}

// s (1 + z (1 - s)); 1 - s = e s without cancellation where s is near 1.
template <typename T>
ATTR_BATCH_HD T silu_derivative(T z) {
  const T x = bound_above(bound_below(z)), e = exp_negated(x), s = T(1) / (T(1) + e);
  const T other = x > T(0) ? e * s : T(1) - s;
  return s * (T(1) + x * other);
}

}  // namespace attr_batch
