// counter_normal on CUDA: one thread per Philox block of four elements. Not yet run on a GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "../normal.h"
#include "launch.cuh"

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

Tensor counter_normal(const Tensor& sample_ids, int64_t elements, int64_t seed, int64_t step) {
  check_key(sample_ids, seed, step);
  check_elements(elements);
  const torch::stable::accelerator::DeviceGuard guard(sample_ids.get_device_index());
  const int64_t batch = sample_ids.size(0);
  const Tensor ids = torch::stable::contiguous(sample_ids);
  Tensor noise = torch::stable::new_empty(ids, {batch, elements}, ScalarType::Float);
  const int64_t threads = batch * ((elements + 3) / 4);
  if (threads == 0) return noise;
  counter_normal_kernel<<<grid_size(threads), kThreads, 0, current_stream(ids)>>>(
      noise.mutable_data_ptr<float>(), ids.const_data_ptr<int64_t>(), batch, elements,
      static_cast<uint64_t>(seed), static_cast<uint32_t>(step));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return noise;
}

}  // namespace attr_batch::cuda

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CUDA, m) {
  m.impl("counter_normal", TORCH_BOX(&attr_batch::cuda::counter_normal));
}
