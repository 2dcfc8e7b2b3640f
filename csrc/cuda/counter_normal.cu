// counter_normal on CUDA. Not yet run on a GPU.
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "counter_normal.cuh"
#include "launch.cuh"

namespace attr_batch::cuda {

Tensor counter_normal(const Tensor& sample_ids, int64_t elements, int64_t seed, int64_t step) {
  check_key(sample_ids, seed, step);
  check_elements(elements);
  const DeviceGuard guard(sample_ids.get_device_index());
  const int64_t batch = sample_ids.size(0);
  const Tensor ids = torch::stable::contiguous(sample_ids);
  Tensor noise = torch::stable::new_empty(ids, {batch, elements}, ScalarType::Float);
  const int64_t threads = batch * ((elements + 3) / 4);
  if (threads == 0) return noise;
  launch(counter_normal_kernel, grid_size(threads), kThreads, 0, current_stream(ids),
         noise.mutable_data_ptr<float>(), ids.const_data_ptr<int64_t>(), batch, elements,
         static_cast<uint64_t>(seed), static_cast<uint32_t>(step));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return noise;
}

}  // namespace attr_batch::cuda

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CUDA, m) {
  m.impl("counter_normal", TORCH_BOX(&attr_batch::cuda::counter_normal));
}
