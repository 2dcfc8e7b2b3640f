// solver_step on CUDA. Not yet run on a GPU.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../arguments.h"
#include "launch.cuh"
#include "solver_step.cuh"

namespace attr_batch::cuda {

template <typename T>
void step_on(const StepOperands& o, int64_t seed, int64_t step, double clip) {
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
  constexpr void (*kKernels[])(Step<T>) = {
      solver_step_kernel<T, 0, false>, solver_step_kernel<T, 0, true>,
      solver_step_kernel<T, 1, false>, solver_step_kernel<T, 1, true>,
      solver_step_kernel<T, 2, false>, solver_step_kernel<T, 2, true>,
      solver_step_kernel<T, 3, false>, solver_step_kernel<T, 3, true>};
  launch(kKernels[2 * o.history.size() + o.channels_last], grid_size(threads), kThreads, 0,
         current_stream(o.sample), s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> solver_step(const Tensor& sample, const Tensor& model_output,
                                       const std::vector<Tensor>& history,
                                       const Tensor& coefficients, const Tensor& sample_ids,
                                       int64_t seed, int64_t step, double clip) {
  const DeviceGuard guard(sample.get_device_index());
  const StepOperands o =
      step_operands(sample, model_output, history, coefficients, sample_ids, seed, step, clip);
  if (model_output.scalar_type() == ScalarType::BFloat16) {
    step_on<__nv_bfloat16>(o, seed, step, clip);
  } else {
    step_on<float>(o, seed, step, clip);
  }
  return {o.next, o.x0};
}

}  // namespace attr_batch::cuda

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CUDA, m) {
  m.impl("solver_step", TORCH_BOX(&attr_batch::cuda::solver_step));
}
