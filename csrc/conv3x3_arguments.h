// What conv3x3 asks of its arguments, and its operands dense in channels_last.
#pragma once

#include <optional>
#include <utility>

#include "arguments.h"

namespace attr_batch {

struct Conv3x3Operands {
  Tensor x, weight;
  std::optional<Tensor> bias, residual;
  int64_t models, batch, height, width, inputs, outputs;
};

inline bool is_float_image(const Tensor& t) {
  return t.dim() == 4 && t.scalar_type() == ScalarType::Float;
}

inline Tensor dense_channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

inline Conv3x3Operands conv3x3_operands(const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(is_float_image(x), "x must be float32 of shape (B, I, H, W)");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.scalar_type() == ScalarType::Float &&
                      weight.size(2) == x.size(1) && weight.size(3) == 3 && weight.size(4) == 3,
                  "weight must be float32 of shape (K, O, I, 3, 3)");
  Conv3x3Operands o{dense_channels_last(x),
                    torch::stable::contiguous(weight),
                    std::nullopt,
                    std::nullopt,
                    weight.size(0),
                    x.size(0),
                    x.size(2),
                    x.size(3),
                    x.size(1),
                    weight.size(1)};
  STD_TORCH_CHECK(o.models > 0 && o.batch % o.models == 0,
                  "the batch must hold as many of every model");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 2 && bias->scalar_type() == ScalarType::Float &&
                        bias->size(0) == o.models && bias->size(1) == o.outputs,
                    "bias must be float32 of shape (K, O)");
    o.bias = torch::stable::contiguous(*bias);
  }
  if (residual) {
    STD_TORCH_CHECK(is_float_image(*residual) && residual->size(0) == o.batch &&
                        residual->size(1) == o.outputs && residual->size(2) == o.height &&
                        residual->size(3) == o.width,
                    "residual must be float32 of shape (B, O, H, W)");
    o.residual = dense_channels_last(*residual);
  }
  return o;
}

// (grad, x), dense.
inline std::pair<Tensor, Tensor> conv3x3_gradients(const Tensor& grad, const Tensor& x,
                                                   int64_t models) {
  STD_TORCH_CHECK(is_float_image(x) && is_float_image(grad) && grad.size(0) == x.size(0) &&
                      grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  "grad (B, O, H, W) and x (B, I, H, W) must be float32 and of one size");
  STD_TORCH_CHECK(models > 0 && x.size(0) % models == 0,
                  "the batch must hold as many of every model");
  return {dense_channels_last(grad), dense_channels_last(x)};
}

}  // namespace attr_batch
