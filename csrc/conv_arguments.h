// What pruned_conv2d's kernels ask of their arguments; attr_batch/ops/conv.py asks the same.
#pragma once

#include <climits>
#include <optional>

#include "arguments.h"

namespace attr_batch {

// x and skip channels_last; what is absent is undefined, and counts no channels.
struct ConvOperands {
  Tensor x, skip;
  int64_t batch, models, own, inputs, outputs;  // `own` channels are x's
  int64_t height, width, kernel_height, kernel_width, out_height, out_width;
};

inline void check_kind(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(),
                  "all tensors must have x's dtype and device");
}

inline ConvOperands conv_operands(const Tensor& x, const std::optional<Tensor>& skip,
                                  const Tensor& weight, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 5,
                  "x must be (B, C, H, W), weight (K, O, I, R, S)");
  if (skip) check_source(*skip, x);
  check_kind(weight, x);
  STD_TORCH_CHECK(stride > 0 && padding >= 0, "stride must be positive, padding not negative");
  ConvOperands o;
  o.batch = x.size(0);
  o.own = x.size(1);
  o.inputs = o.own + (skip ? skip->size(1) : 0);
  o.height = x.size(2);
  o.width = x.size(3);
  o.models = weight.size(0);
  o.outputs = weight.size(1);
  o.kernel_height = weight.size(3);
  o.kernel_width = weight.size(4);
  STD_TORCH_CHECK(weight.size(2) == o.inputs, "weight's inputs must be x's and skip's channels");
  STD_TORCH_CHECK(o.models > 0 && o.batch % o.models == 0,
                  "the batch must hold as many of every model");
  const int64_t high = o.height + 2 * padding, wide = o.width + 2 * padding;
  STD_TORCH_CHECK(o.kernel_height > 0 && o.kernel_width > 0 && o.kernel_height <= high &&
                      o.kernel_width <= wide,
                  "the kernel must fit into the padded image");
  o.out_height = (high - o.kernel_height) / stride + 1;
  o.out_width = (wide - o.kernel_width) / stride + 1;
  const auto countable = [](int64_t n) {
    STD_TORCH_CHECK(n <= INT_MAX, "one model's images are too many or too large for pruned_conv2d");
  };
  countable(high);
  countable(wide);
  countable(o.batch / o.models * o.height * o.width);
  countable(o.batch / o.models * o.out_height * o.out_width);
  countable(o.kernel_height * o.kernel_width * (o.inputs + o.outputs));
  o.x = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  if (skip) o.skip = torch::stable::contiguous(*skip, MemoryFormat::ChannelsLast);
  return o;
}

// A tensor of y's shape: the residual, or the gradient. channels_last.
inline Tensor like_output(const ConvOperands& o, const Tensor& t, const char* name) {
  check_kind(t, o.x);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == o.batch && t.size(1) == o.outputs &&
                      t.size(2) == o.out_height && t.size(3) == o.out_width,
                  name, " must have the output's shape");
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

}  // namespace attr_batch
