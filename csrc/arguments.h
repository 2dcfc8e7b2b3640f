// What the two back ends ask of an op's arguments, once. The references and the fake kernels in
// attr_batch/ops/ ask the same; here it also keeps kernels inside their buffers.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "update.h"

namespace attr_batch {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_key(const Tensor& sample_ids, int64_t seed, int64_t step) {
  STD_TORCH_CHECK(sample_ids.dim() == 1 && sample_ids.scalar_type() == ScalarType::Long,
                  "sample_ids must be int64 of shape (B,)");
  STD_TORCH_CHECK(seed >= 0, "seed must be in [0, 2^63)");
  STD_TORCH_CHECK(step >= 0 && step <= UINT32_MAX, "step must be in [0, 2^32)");
}

inline void check_elements(int64_t elements) {
  STD_TORCH_CHECK(elements >= 0 && elements <= INT32_MAX, "elements must be in [0, 2^31)");
}

inline void check_like(const Tensor& tensor, const Tensor& sample, const char* name) {
  bool same = tensor.dim() == 4 && tensor.device() == sample.device();
  for (int64_t d = 0; same && d < 4; ++d) same = tensor.size(d) == sample.size(d);
  STD_TORCH_CHECK(same, name, " must have sample's shape and device");
}

// The operands of one step in one memory layout: dense, channels_last where `sample` is (and is not
// contiguous as well), else contiguous. All pointers run over memory in the same order.
struct StepOperands {
  Tensor sample, output, coefficients, sample_ids;
  std::vector<Tensor> history;
  Tensor next, x0;
  int64_t batch, channels, pixels;
  bool channels_last;
};

inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline StepOperands step_operands(const Tensor& sample, const Tensor& model_output,
                                  const std::vector<Tensor>& history, const Tensor& coefficients,
                                  const Tensor& sample_ids, int64_t seed, int64_t step,
                                  double clip) {
  STD_TORCH_CHECK(sample.dim() == 4 && sample.scalar_type() == ScalarType::Float,
                  "sample must be float32 of shape (B, C, H, W)");
  check_like(model_output, sample, "model_output");
  STD_TORCH_CHECK(model_output.scalar_type() == ScalarType::Float ||
                      model_output.scalar_type() == ScalarType::BFloat16,
                  "model_output must be float32 or bfloat16");
  STD_TORCH_CHECK(history.size() <= kMaxHistory, "history must hold at most 3 tensors");
  for (const Tensor& h : history) {
    check_like(h, sample, "history");
    STD_TORCH_CHECK(h.scalar_type() == ScalarType::Float, "history must be float32");
  }
  STD_TORCH_CHECK(coefficients.dim() == 1 && coefficients.scalar_type() == ScalarType::Float &&
                      coefficients.size(0) == static_cast<int64_t>(5 + history.size()) &&
                      coefficients.device() == sample.device(),
                  "coefficients must be float32 of shape (5 + len(history),) on sample's device");
  check_key(sample_ids, seed, step);
  STD_TORCH_CHECK(sample_ids.size(0) == sample.size(0) && sample_ids.device() == sample.device(),
                  "sample_ids must name every sample, on its device");
  STD_TORCH_CHECK(clip >= 0, "clip must be >= 0 (inf: no clipping)");

  StepOperands o;
  o.batch = sample.size(0);
  o.channels = sample.size(1);
  o.pixels = sample.size(2) * sample.size(3);
  check_elements(o.channels * o.pixels);
  o.channels_last = is_channels_last(sample);
  const auto format = o.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  o.sample = torch::stable::contiguous(sample, format);
  o.output = torch::stable::contiguous(model_output, format);
  for (const Tensor& h : history) o.history.push_back(torch::stable::contiguous(h, format));
  o.coefficients = torch::stable::contiguous(coefficients);
  o.sample_ids = torch::stable::contiguous(sample_ids);
  const auto empty = [&] {
    return torch::stable::empty(sample.sizes(), ScalarType::Float, std::nullopt, sample.device(),
                                std::nullopt, format);
  };
  o.next = empty();
  o.x0 = empty();
  return o;
}

// The operands of norm_act: x and skip channels_last, the parameters in the dtype of the
// arithmetic. What is absent is undefined, and counts no channels.
struct NormOperands {
  Tensor x, skip, weight, bias, add, scale, shift;
  ScalarType arithmetic;
  int64_t batch, own, channels, pixels, groups, models;  // `own` channels are x's
};

inline Tensor parameter(const Tensor& t, ScalarType dtype, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

inline void check_source(const Tensor& skip, const Tensor& x) {
  STD_TORCH_CHECK(skip.dim() == 4 && skip.size(0) == x.size(0) && skip.size(2) == x.size(2) &&
                      skip.size(3) == x.size(3) && skip.scalar_type() == x.scalar_type() &&
                      skip.device() == x.device(),
                  "skip must have x's batch, height, width, dtype and device");
}

inline NormOperands norm_operands(const Tensor& x, const std::optional<Tensor>& skip,
                                  const Tensor& weight, const Tensor& bias,
                                  const std::optional<Tensor>& add,
                                  const std::optional<Tensor>& scale,
                                  const std::optional<Tensor>& shift, int64_t groups) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                                   dtype == ScalarType::Double),
                  "x must be float32, bfloat16 or float64 of shape (B, C, H, W)");
  if (skip) check_source(*skip, x);
  NormOperands o;
  o.arithmetic = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  o.batch = x.size(0);
  o.own = x.size(1);
  o.channels = o.own + (skip ? skip->size(1) : 0);
  o.pixels = x.size(2) * x.size(3);
  o.groups = groups;
  STD_TORCH_CHECK(groups > 0 && o.channels % groups == 0, o.channels, " channels do not fall into ",
                  groups, " equal groups");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == o.channels && bias.dim() == 2 &&
                      bias.size(0) == weight.size(0) && bias.size(1) == o.channels,
                  "weight and bias must be (C,) or (K, C)");
  o.models = weight.size(0);
  STD_TORCH_CHECK(o.models > 0 && o.batch % o.models == 0,
                  "the batch must hold as many of every model");
  o.x = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  if (skip) o.skip = torch::stable::contiguous(*skip, MemoryFormat::ChannelsLast);
  o.weight = parameter(weight, o.arithmetic, x, "weight");
  o.bias = parameter(bias, o.arithmetic, x, "bias");
  const auto per_sample = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t) return Tensor();
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == o.batch && t->size(1) == o.channels, name,
                    " must be (B, C)");
    return parameter(*t, o.arithmetic, x, name);
  };
  o.add = per_sample(add, "add");
  o.scale = per_sample(scale, "scale");
  o.shift = per_sample(shift, "shift");
  return o;
}

// What the derivative is asked about besides: channels_last, in x's dtype.
inline Tensor norm_gradient(const NormOperands& o, const Tensor& grad, const Tensor& stats) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == o.batch && grad.size(1) == o.channels &&
                      grad.size(2) == o.x.size(2) && grad.size(3) == o.x.size(3) &&
                      grad.scalar_type() == o.x.scalar_type() && grad.device() == o.x.device(),
                  "grad must have the output's shape, dtype and device");
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(0) == o.batch && stats.size(1) == o.groups &&
                      stats.size(2) == 2 && stats.scalar_type() == o.arithmetic &&
                      stats.device() == o.x.device(),
                  "stats must be norm_act's, of shape (B, groups, 2)");
  return torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
}

inline Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  return torch::stable::empty({like.size(0), channels, like.size(2), like.size(3)},
                              like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

}  // namespace attr_batch
