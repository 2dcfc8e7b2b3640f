// solver_step on CUDA: one thread per Philox block of four logical elements, everything in
// registers. The coefficients are read on the device, so a captured graph may be replayed with a
// new row.
#pragma once

#include "../normal.h"
#include "../update.h"
#include "device.cuh"

namespace attr_batch::cuda {

template <typename T>
struct Step {
  const float* sample;
  const T* output;
  const float* history[kMaxHistory];
  const float* k;
  const int64_t* ids;
  float* next;
  float* x0;
  int64_t batch, channels, pixels;
  uint64_t seed;
  uint32_t step;
  float clip;
};

template <typename T, int H, bool kChannelsLast>
__global__ void solver_step_kernel(const Step<T> s) {
  const int64_t elements = s.channels * s.pixels, blocks = (elements + 3) / 4;
  const float noise_scale = s.k[4 + H];
  for (int64_t t = first_thread(); t < s.batch * blocks; t += thread_count()) {
    const int64_t b = t / blocks, block = t % blocks;
    float z[4] = {};
    if (noise_scale != 0.0f) {
      block_normals(s.seed, static_cast<uint64_t>(s.ids[b]), s.step, static_cast<uint32_t>(block),
                    z);
    }
    for (int64_t lane = 0; lane < 4 && 4 * block + lane < elements; ++lane) {
      const int64_t e = 4 * block + lane;
      const int64_t offset = kChannelsLast ? offset_channels_last(e, s.channels, s.pixels) : e;
      const int64_t i = b * elements + offset;
      const float sample = s.sample[i];
      const float x0 = predict_x0(s.k[0], sample, s.k[1], widen(s.output[i]), s.clip);
      float next = first_terms(s.k[2], sample, s.k[3], x0);
      for (int j = 0; j < H; ++j) next = add_term(next, s.k[4 + j], s.history[j][i]);
      if (noise_scale != 0.0f) next = add_term(next, noise_scale, z[lane]);
      s.x0[i] = x0;
      s.next[i] = next;
    }
  }
}

}  // namespace attr_batch::cuda
