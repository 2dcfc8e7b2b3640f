#pragma once

#include <cstdint>

namespace attr_batch::cpu {

// Writes the normals of elements 0 .. elements-1 of one sample.
void fill_normal(float* out, int64_t elements, uint64_t seed, uint64_t id, uint32_t step);

}  // namespace attr_batch::cpu
