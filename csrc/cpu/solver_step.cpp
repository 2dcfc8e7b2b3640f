// solver_step on the CPU: a sample at a time, in tiles that stay in the first-level cache, one
// plain loop per term of the formula.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "bfloat16.h"
#include "fill_normal.h"

namespace attr_batch::cpu {

constexpr int64_t kTile = 1024;

// One sample's pointers; `noise` lies in memory order like the rest, or is null.
struct Sample {
  const float* sample;
  const void* output;
  std::array<const float*, kMaxHistory> history;
  const float* noise;
  float* next;
  float* x0;
};

template <typename T>
ATTR_BATCH_HD void predict_tile(const float* __restrict__ sample, const T* __restrict__ output,
                                float* __restrict__ x0, float* __restrict__ next, int64_t n,
                                const float* k, float clip) {
  const float k0 = k[0], k1 = k[1], k2 = k[2], k3 = k[3];
  for (int64_t i = 0; i < n; ++i) {
    x0[i] = predict_x0(k0, sample[i], k1, widen(output[i]), clip);
    next[i] = first_terms(k2, sample[i], k3, x0[i]);
  }
}

ATTR_BATCH_HD void add_tile(float* __restrict__ next, const float* __restrict__ value, int64_t n,
                            float k) {
  for (int64_t i = 0; i < n; ++i) next[i] = add_term(next[i], k, value[i]);
}

template <typename T>
ATTR_BATCH_HD void update(const Sample& s, int64_t elements, int history, const float* k,
                          float clip) {
  for (int64_t i = 0; i < elements; i += kTile) {
    const int64_t n = std::min(kTile, elements - i);
    predict_tile(s.sample + i, static_cast<const T*>(s.output) + i, s.x0 + i, s.next + i, n, k,
                 clip);
    for (int j = 0; j < history; ++j) add_tile(s.next + i, s.history[j] + i, n, k[4 + j]);
    if (s.noise != nullptr) add_tile(s.next + i, s.noise + i, n, k[4 + history]);
  }
}

ATTR_BATCH_CLONES
void update_float32(const Sample& s, int64_t elements, int history, const float* k, float clip) {
  update<float>(s, elements, history, k, clip);
}

ATTR_BATCH_CLONES
void update_bfloat16(const Sample& s, int64_t elements, int history, const float* k, float clip) {
  update<uint16_t>(s, elements, history, k, clip);
}

// (C, H, W) to (H, W, C).
void to_channels_last(const float* from, float* to, int64_t channels, int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) to[p * channels + c] = from[c * pixels + p];
  }
}

std::tuple<Tensor, Tensor> solver_step(const Tensor& sample, const Tensor& model_output,
                                       const std::vector<Tensor>& history,
                                       const Tensor& coefficients, const Tensor& sample_ids,
                                       int64_t seed, int64_t step, double clip) {
  StepOperands o =
      step_operands(sample, model_output, history, coefficients, sample_ids, seed, step, clip);
  const int64_t elements = o.channels * o.pixels;
  const int H = static_cast<int>(history.size());
  const bool bfloat16 = model_output.scalar_type() == ScalarType::BFloat16;
  const auto* k = o.coefficients.const_data_ptr<float>();
  const auto* id = o.sample_ids.const_data_ptr<int64_t>();
  const bool noisy = k[4 + H] != 0.0f;
  const auto* from = o.sample.const_data_ptr<float>();
  const auto* output = static_cast<const char*>(o.output.const_data_ptr());
  auto* next = o.next.mutable_data_ptr<float>();
  auto* x0 = o.x0.mutable_data_ptr<float>();
  std::array<const float*, kMaxHistory> earlier{};
  for (int j = 0; j < H; ++j) earlier[j] = o.history[j].const_data_ptr<float>();

  const int64_t grain = 1 + 32768 / std::max<int64_t>(elements, 1);  // samples worth a thread
  torch::stable::parallel_for(0, o.batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> logical(noisy ? elements : 0);
    std::vector<float> permuted(noisy && o.channels_last ? elements : 0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = b * elements;
      Sample s{from + start, output + start * (bfloat16 ? 2 : 4), {}, nullptr, next + start,
               x0 + start};
      for (int j = 0; j < H; ++j) s.history[j] = earlier[j] + start;
      if (noisy) {
        fill_normal(logical.data(), elements, static_cast<uint64_t>(seed),
                    static_cast<uint64_t>(id[b]), static_cast<uint32_t>(step));
        s.noise = logical.data();
        if (o.channels_last) {
          to_channels_last(logical.data(), permuted.data(), o.channels, o.pixels);
          s.noise = permuted.data();
        }
      }
      (bfloat16 ? update_bfloat16 : update_float32)(s, elements, H, k, static_cast<float>(clip));
    }
  });
  return {o.next, o.x0};
}

}  // namespace attr_batch::cpu

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CPU, m) {
  m.impl("solver_step", TORCH_BOX(&attr_batch::cpu::solver_step));
}
