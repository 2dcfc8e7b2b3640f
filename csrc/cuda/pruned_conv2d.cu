// pruned_conv2d on CUDA. Not yet run on a GPU.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../conv_arguments.h"
#include "launch.cuh"
#include "pruned_conv2d.cuh"

namespace attr_batch::cuda {

constexpr int64_t kMaxGridZ = 65535;

ConvShape shape_of(const ConvOperands& o, int64_t stride, int64_t padding) {
  const ConvShape s{o.batch,
                    static_cast<int>(o.models),
                    static_cast<int>(o.height),
                    static_cast<int>(o.width),
                    static_cast<int>(o.own),
                    static_cast<int>(o.inputs - o.own),
                    static_cast<int>(o.outputs),
                    static_cast<int>(o.kernel_height),
                    static_cast<int>(o.kernel_width),
                    static_cast<int>(stride),
                    static_cast<int>(padding)};
  STD_TORCH_CHECK(o.models <= kMaxGridZ, "pruned_conv2d on CUDA takes at most ", kMaxGridZ,
                  " models");
  return s;
}

template <typename T>
const T* data(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
Pair<const T> sources(ConvOperands& o, const ConvShape& s) {
  o.x = aligned(o.x);
  if (o.skip.defined()) o.skip = aligned(o.skip);
  return {data<T>(o.x), data<T>(o.skip), s.first, s.second};
}

// The weight in the order the kernel reads it, in memory of its own.
template <typename T>
Tensor pack(const Tensor& weight, bool transposed, cudaStream_t stream) {
  Packing p{static_cast<int>(weight.size(1)),
            static_cast<int>(weight.size(2)),
            static_cast<int>(weight.size(3)),
            static_cast<int>(weight.size(4)),
            {},
            transposed};
  for (int d = 0; d < 5; ++d) p.stride[d] = weight.stride(d);
  Tensor packed = torch::stable::new_empty(weight, {weight.size(0), p.size()});
  pack_on<T>(stream, p, static_cast<int>(weight.size(0)), data<T>(weight), mutable_data<T>(packed));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

// Calls f with the element type.
template <typename F>
void with_type(const Tensor& x, F f) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "pruned_conv2d on CUDA takes float32 and bfloat16");
  dtype == ScalarType::BFloat16 ? f.template operator()<__nv_bfloat16>()
                                : f.template operator()<float>();
}

Tensor pruned_conv2d(const Tensor& x, const std::optional<Tensor>& skip, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     int64_t stride, int64_t padding) {
  const DeviceGuard guard(x.get_device_index());
  ConvOperands o = conv_operands(x, skip, weight, stride, padding);
  Tensor of_bias, of_residual;
  if (bias) {
    check_kind(*bias, x);
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == o.models && bias->size(1) == o.outputs,
                    "bias must be (O,) or (K, O)");
    of_bias = torch::stable::contiguous(*bias);
  }
  if (residual) of_residual = like_output(o, *residual, "residual");
  const ConvShape s = shape_of(o, stride, padding);
  Tensor y =
      torch::stable::empty({o.batch, o.outputs, o.out_height, o.out_width}, x.scalar_type(),
                           std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  with_type(x, [&]<typename T>() {
    if (y.numel() == 0) return;
    const auto stream = current_stream(x);
    const Pair<const T> in = sources<T>(o, s);
    const Tensor packed = pack<T>(weight, false, stream);
    const Operands<T> operands{in,
                               data<T>(packed),
                               data<T>(of_bias),
                               data<T>(of_residual),
                               {mutable_data<T>(y), nullptr, s.outputs, 0},
                               s.outputs,
                               s.samples()};
    conv_on<T, false>(stream, s.forward(), operands, s.models);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pruned_conv2d_backward(const Tensor& grad, const Tensor& x,
                                                          const std::optional<Tensor>& skip,
                                                          const Tensor& weight, int64_t stride,
                                                          int64_t padding) {
  const DeviceGuard guard(x.get_device_index());
  ConvOperands o = conv_operands(x, skip, weight, stride, padding);
  const Tensor of_y = aligned(like_output(o, grad, "grad"));
  const ConvShape s = shape_of(o, stride, padding);
  STD_TORCH_CHECK(o.models * WeightPlan(s).splits <= kMaxGridZ,
                  "pruned_conv2d on CUDA takes fewer models of this size");
  Tensor dx = empty_channels_last(o.x, o.own);
  Tensor dskip =
      skip ? empty_channels_last(o.x, o.inputs - o.own) : torch::stable::new_empty(o.x, {0});
  Tensor dweight =
      torch::stable::empty(weight.sizes(), weight.scalar_type(), std::nullopt, weight.device());
  with_type(x, [&]<typename T>() {
    const auto stream = current_stream(x);
    if (o.batch * o.height * o.width * o.inputs > 0) {
      const Tensor packed = pack<T>(weight, true, stream);
      const Operands<T> operands{{data<T>(of_y), nullptr, s.outputs, 0},
                                 data<T>(packed),
                                 nullptr,
                                 nullptr,
                                 {mutable_data<T>(dx), mutable_data<T>(dskip), s.first, s.second},
                                 s.inputs(),
                                 s.samples()};
      conv_on<T, true>(stream, s.transposed(), operands, s.models);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (dweight.numel() > 0) {
      Tensor part = torch::stable::new_empty(o.x, {part_size(s)}, ScalarType::Float);
      weight_on<T>(stream, s, sources<T>(o, s), data<T>(of_y), part.mutable_data_ptr<float>(),
                   mutable_data<T>(dweight));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {dx, dskip, dweight};
}

}  // namespace attr_batch::cuda

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CUDA, m) {
  m.impl("pruned_conv2d", TORCH_BOX(&attr_batch::cuda::pruned_conv2d));
  m.impl("pruned_conv2d_backward", TORCH_BOX(&attr_batch::cuda::pruned_conv2d_backward));
}
