// Philox4x32-10: a bijection of a 128-bit counter under a 64-bit key, so a random number is a pure
// function of where it is used. Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011), section 3.3; the known answers of its authors' Random123 are in tests.
#pragma once

#include <cstdint>

#include "portable.h"

namespace attr_batch {

struct Words {
  uint32_t w0, w1, w2, w3;
};

ATTR_BATCH_HD Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio, sqrt(3) - 1
  ATTR_BATCH_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter.w0;
    const uint64_t product1 = kMultiplier1 * counter.w2;
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The layout of this project: elements 4*block .. 4*block+3 of sample `id` at `step` under `seed`.
// Counter = (block, step, id low, id high), key = (seed low, seed high).
ATTR_BATCH_HD Words random_words(uint64_t seed, uint64_t id, uint32_t step, uint32_t block) {
  const Words counter{block, step, static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
  return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace attr_batch
