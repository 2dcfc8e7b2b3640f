// counter_normal on CUDA: one thread per Philox block of four elements.
#pragma once

#include "../normal.h"
#include "device.cuh"

namespace attr_batch::cuda {

__global__ void counter_normal_kernel(float* __restrict__ out, const int64_t* __restrict__ ids,
                                      int64_t batch, int64_t elements, uint64_t seed,
                                      uint32_t step) {
  const int64_t blocks = (elements + 3) / 4;
  for (int64_t t = first_thread(); t < batch * blocks; t += thread_count()) {
    const int64_t b = t / blocks, block = t % blocks;
    float z[4];
    block_normals(seed, static_cast<uint64_t>(ids[b]), step, static_cast<uint32_t>(block), z);
    for (int64_t lane = 0; lane < 4 && 4 * block + lane < elements; ++lane) {
      out[b * elements + 4 * block + lane] = z[lane];
    }
  }
}

}  // namespace attr_batch::cuda
