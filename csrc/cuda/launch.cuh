// All kernels run on PyTorch's current stream, so they can be captured in a CUDA graph. The few
// lines for real GPUs have stand-ins in tests/cuda_on_cpu.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "device.cuh"

namespace attr_batch::cuda {

#ifdef __CUDACC__
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// A dense tensor where vectors may be loaded from. A view may start anywhere; it is copied rather
// than read otherwise, because another order of summation would give other bits.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& t) {
  const bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kVectorBytes == 0;
  return fits ? t : torch::stable::clone(t);
}

}  // namespace attr_batch::cuda
