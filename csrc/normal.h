// Standard normals from pairs of 32-bit words by Box-Muller, with a logarithm, sine and cosine of
// our own: library versions differ between CPUs and GPUs in the last bits, these cannot
// (portable.h).
//
// With u = (x + 1/2) / 2^32 and v = y / 2^32: z0 = sqrt(-2 ln u) cos 2 pi v, z1 = the same with
// sin. Against float64 the error is below 1e-6; |z| <= sqrt(66 ln 2) = 6.764.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace attr_batch {

struct NormalPair {
  float z0, z1;
};

// ln((x + 1/2) / 2^32), relative error below 2e-7. Write u = 2^e (1 + f) with 1 + f in [2/3, 4/3):
// ln u = e ln 2 + 2 artanh(s), s = f / (2 + f). Near u = 1 the float u has no room for 1 - u, on
// which the radius hangs; there f = u - 1 is taken from the integer, exact to a relative 2^-24.
ATTR_BATCH_HD float log_uniform(uint32_t x) {
  constexpr float kUlp = 0x1p-32f, kLn2 = 0x1.62e43p-1f;
  const uint32_t two_thirds = 0x3F2AAAAB;  // the bits of the float 2/3
  const uint32_t bits = to_bits((static_cast<float>(x) + 0.5f) * kUlp);
  const int32_t exponent = static_cast<int32_t>(bits - two_thirds) >> 23;
  const float f_far = from_bits(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float f_near = -(static_cast<float>(~x) + 0.5f) * kUlp;
  const bool near_one = x >= 0xAAAAAAABu;
  const float f = select(near_one, f_near, f_far);
  const float e = select(near_one, 0.0f, static_cast<float>(exponent));
  const float s = f / (2.0f + f), z = s * s;
  // (2 artanh(s) - 2 s) / s^3 on s^2 in [0, 1/25], Chebyshev fit, error 5e-7.
  const float tail = 0.66666716f + z * (0.3997894f + z * 0.29957587f);
  return e * kLn2 + (2.0f * s + s * z * tail);
}

// cos and sin of 2 pi y / 2^32. The quadrant is taken off in integers, without rounding.
ATTR_BATCH_HD NormalPair cos_sin_turn(uint32_t y) {
  const uint32_t quadrant = (y + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(y - (quadrant << 30));
  const float a = static_cast<float>(rest) * 0x1.921fb6p-30f;  // |a| <= pi/4
  const float z = a * a;
  // (sin a - a) / a^3 and (cos a - 1 + a^2/2) / a^4 on a^2 in [0, pi^2/16], errors 2e-8 and 2e-9.
  const float sine = a + a * z * (-0.16666664f + z * (0.008332749f + z * -0.0001958795f));
  const float cosine =
      (1.0f - 0.5f * z) + z * z * (0.041666664f + z * (-0.0013888304f + z * 2.4547991e-05f));
  const bool odd = (quadrant & 1) != 0;
  const uint32_t cosine_sign = ((quadrant + 1) & 2) << 30, sine_sign = (quadrant & 2) << 30;
  return {from_bits(to_bits(select(odd, sine, cosine)) ^ cosine_sign),
          from_bits(to_bits(select(odd, cosine, sine)) ^ sine_sign)};
}

ATTR_BATCH_HD NormalPair box_muller(uint32_t x, uint32_t y) {
  const float radius = sqrtf(-2.0f * log_uniform(x));
  const NormalPair turn = cos_sin_turn(y);
  return {radius * turn.z0, radius * turn.z1};
}

// The normals of elements 4*block .. 4*block+3.
ATTR_BATCH_HD void block_normals(uint64_t seed, uint64_t id, uint32_t step, uint32_t block,
                                 float z[4]) {
  const Words words = random_words(seed, id, step, block);
  const NormalPair first = box_muller(words.w0, words.w1);
  const NormalPair second = box_muller(words.w2, words.w3);
  z[0] = first.z0;
  z[1] = first.z1;
  z[2] = second.z0;
  z[3] = second.z1;
}

}  // namespace attr_batch
