// norm_act on CUDA. Not yet run on a GPU.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <optional>
#include <tuple>

#include "../arguments.h"
#include "launch.cuh"
#include "norm_act.cuh"

namespace attr_batch::cuda {

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

void check_limits(const NormOperands& o) {
  STD_TORCH_CHECK(o.arithmetic == ScalarType::Float,
                  "norm_act on CUDA takes float32 and bfloat16, not float64");
  check_elements(o.channels * o.pixels);
  STD_TORCH_CHECK(o.channels / o.groups <= kMaxGroupWidth,
                  "norm_act on CUDA takes groups of at most ", kMaxGroupWidth, " channels");
  STD_TORCH_CHECK(o.batch * o.groups <= INT_MAX, "norm_act on CUDA takes fewer than 2^31 groups");
}

template <typename T>
Pair<const T> sources(NormOperands& o) {
  o.x = aligned(o.x);
  if (o.skip.defined()) o.skip = aligned(o.skip);
  return {static_cast<const T*>(o.x.const_data_ptr()),
          o.skip.defined() ? static_cast<const T*>(o.skip.const_data_ptr()) : nullptr,
          static_cast<int>(o.own), static_cast<int>(o.channels - o.own)};
}

template <typename T>
NormAct<T> norm_of(NormOperands& o, bool silu) {
  return {sources<T>(o),
          floats(o.weight),
          floats(o.bias),
          floats(o.add),
          floats(o.scale),
          floats(o.shift),
          o.batch,
          static_cast<int>(o.models),
          static_cast<int>(o.pixels),
          static_cast<int>(o.groups),
          silu};
}

std::tuple<Tensor, Tensor> norm_act(const Tensor& x, const std::optional<Tensor>& skip,
                                    const Tensor& weight, const Tensor& bias,
                                    const std::optional<Tensor>& add,
                                    const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& shift, int64_t groups, double eps,
                                    bool silu) {
  const DeviceGuard guard(x.get_device_index());
  NormOperands o = norm_operands(x, skip, weight, bias, add, scale, shift, groups);
  check_limits(o);
  Tensor y = empty_channels_last(o.x, o.channels);
  Tensor stats = torch::stable::new_empty(o.x, {o.batch, groups, 2}, ScalarType::Float);
  if (o.batch == 0 || o.channels == 0) return {y, stats};
  const auto run = [&]<typename T>() {
    norm_act_on<T>(current_stream(x), norm_of<T>(o, silu), static_cast<float>(eps),
                   static_cast<T*>(y.mutable_data_ptr()), stats.mutable_data_ptr<float>());
  };
  o.x.scalar_type() == ScalarType::BFloat16 ? run.operator()<__nv_bfloat16>()
                                            : run.operator()<float>();
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& add, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const Tensor& stats, int64_t groups, bool silu) {
  const DeviceGuard guard(x.get_device_index());
  NormOperands o = norm_operands(x, skip, weight, bias, add, scale, shift, groups);
  check_limits(o);
  const Tensor of_y = aligned(norm_gradient(o, grad, stats));
  const Tensor of_stats = torch::stable::contiguous(stats);
  Tensor dx = empty_channels_last(o.x, o.own);
  Tensor dskip =
      skip ? empty_channels_last(o.x, o.channels - o.own) : torch::stable::new_empty(o.x, {0});
  Tensor sums = torch::stable::new_empty(o.x, {o.batch, 3, o.channels}, ScalarType::Float);
  if (o.batch == 0 || o.channels == 0) return {dx, dskip, sums};
  const auto run = [&]<typename T>() {
    const NormAct<T> a = norm_of<T>(o, silu);
    const Pair<T> out{static_cast<T*>(dx.mutable_data_ptr()),
                      static_cast<T*>(dskip.mutable_data_ptr()), a.in.first_width,
                      a.in.second_width};
    norm_act_backward_on<T>(current_stream(x), a, static_cast<const T*>(of_y.const_data_ptr()),
                            of_stats.const_data_ptr<float>(), out, sums.mutable_data_ptr<float>());
  };
  o.x.scalar_type() == ScalarType::BFloat16 ? run.operator()<__nv_bfloat16>()
                                            : run.operator()<float>();
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dskip, sums};
}

}  // namespace attr_batch::cuda

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CUDA, m) {
  m.impl("norm_act", TORCH_BOX(&attr_batch::cuda::norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&attr_batch::cuda::norm_act_backward));
}
