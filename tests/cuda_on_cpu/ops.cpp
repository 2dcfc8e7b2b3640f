// The CUDA ops as they stand, kernels and host code, compiled for the emulation and registered for
// CPU tensors. The build renames attr_batch, so they live beside the real ones.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <utility>

#include "cuda_on_cpu.h"

namespace attr_batch::cuda {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

}  // namespace attr_batch::cuda

namespace cuda_on_cpu {

inline void check_launch() {
  const std::string error = std::exchange(block.error, "");
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace cuda_on_cpu

#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() cuda_on_cpu::check_launch()
#define CUDA CPU  // the dispatch key they register for
#include "../../csrc/cuda/counter_normal.cu"
#include "../../csrc/cuda/norm_act.cu"
#include "../../csrc/cuda/pruned_conv2d.cu"
#include "../../csrc/cuda/solver_step.cu"
#undef CUDA

// What the emulation must notice -----------------------------------------------------------------

namespace {

using namespace attr_batch::cuda;

void divergent_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void missing_thread(float*) {
  if (threadIdx.x != 5) __syncthreads();
}

void half_a_warp(float*) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

void misaligned_row(float*) {
  uint32_t blocks[4];
  load_blocks<false>(blocks, reinterpret_cast<const __nv_bfloat16*>(shared_memory()) + 1);
}

// Without a barrier between, what a thread reads of its neighbour depends on who ran first.
void race(float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

void past_the_end(float*) { shared_memory()[64 * sizeof(float) * 20 + threadIdx.x] = 1; }

void well_behaved(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, static_cast<float>(threadIdx.x), 1);
  __syncthreads();
}

}  // namespace

// Runs one of the kernels above on 64 threads, out (64,); returns the error.
extern "C" __attribute__((visibility("default"))) const char* run_misuse(int which, float* out) {
  constexpr void (*kKernels[])(float*) = {
      divergent_barrier, missing_thread, half_a_warp, misaligned_row, race,
      past_the_end,      well_behaved,
  };
  static std::string error;
  launch(kKernels[which], 1, 64, 64 * sizeof(float) * 20, nullptr, out);
  error = std::exchange(cuda_on_cpu::block.error, "");
  return error.c_str();
}

extern "C" __attribute__((visibility("default"))) void set_order(int order) {
  cuda_on_cpu::block.order = static_cast<cuda_on_cpu::Order>(order);
}
