// solver_step on CUDA: one thread per Philox block of four logical elements, everything in
// registers. The coefficients are read on the device, so a captured graph may be replayed with a
// new row. Not yet run on a GPU.
#include <cuda_bf16.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../arguments.h"
#include "../normal.h"
#include "launch.cuh"

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

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

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

template <typename T, int H>
void launch(const Step<T>& s, bool channels_last, unsigned grid, cudaStream_t stream) {
  if (channels_last) {
    solver_step_kernel<T, H, true><<<grid, kThreads, 0, stream>>>(s);
  } else {
    solver_step_kernel<T, H, false><<<grid, kThreads, 0, stream>>>(s);
  }
}

template <typename T>
void run(const StepOperands& o, int64_t seed, int64_t step, double clip) {
  const int64_t threads = o.batch * ((o.channels * o.pixels + 3) / 4);
  if (threads == 0) return;
  Step<T> s{o.sample.const_data_ptr<float>(),
            static_cast<const T*>(o.output.const_data_ptr()),
            {},
            o.coefficients.const_data_ptr<float>(),
            o.sample_ids.const_data_ptr<int64_t>(),
            o.next.mutable_data_ptr<float>(),
            o.x0.mutable_data_ptr<float>(),
            o.batch,
            o.channels,
            o.pixels,
            static_cast<uint64_t>(seed),
            static_cast<uint32_t>(step),
            static_cast<float>(clip)};
  for (size_t j = 0; j < o.history.size(); ++j) s.history[j] = o.history[j].const_data_ptr<float>();
  constexpr void (*kLaunch[])(const Step<T>&, bool, unsigned, cudaStream_t) = {
      launch<T, 0>, launch<T, 1>, launch<T, 2>, launch<T, 3>};
  kLaunch[o.history.size()](s, o.channels_last, grid_size(threads), current_stream(o.sample));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> solver_step(const Tensor& sample, const Tensor& model_output,
                                       const std::vector<Tensor>& history,
                                       const Tensor& coefficients, const Tensor& sample_ids,
                                       int64_t seed, int64_t step, double clip) {
  const torch::stable::accelerator::DeviceGuard guard(sample.get_device_index());
  const StepOperands o =
      step_operands(sample, model_output, history, coefficients, sample_ids, seed, step, clip);
  if (model_output.scalar_type() == ScalarType::BFloat16) {
    run<__nv_bfloat16>(o, seed, step, clip);
  } else {
    run<float>(o, seed, step, clip);
  }
  return {o.next, o.x0};
}

}  // namespace attr_batch::cuda

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CUDA, m) {
  m.impl("solver_step", TORCH_BOX(&attr_batch::cuda::solver_step));
}
