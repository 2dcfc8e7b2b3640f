// counter_normal on the CPU: 16 Philox blocks (64 normals) at a time, one block a vector lane.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../arguments.h"
#include "../normal.h"
#include "fill_normal.h"

namespace attr_batch::cpu {

constexpr int64_t kLanes = 16, kGroup = 4 * kLanes;

ATTR_BATCH_CLONES
void fill_normal(float* out, int64_t elements, uint64_t seed, uint64_t id, uint32_t step) {
  float group[kGroup];
  for (int64_t start = 0; start < elements; start += kGroup) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto block = static_cast<uint32_t>(start / 4 + lane);
      block_normals(seed, id, step, block, group + 4 * lane);
    }
    std::copy_n(group, std::min(kGroup, elements - start), out + start);
  }
}

Tensor counter_normal(const Tensor& sample_ids, int64_t elements, int64_t seed, int64_t step) {
  check_key(sample_ids, seed, step);
  check_elements(elements);
  const int64_t batch = sample_ids.size(0);
  const Tensor ids = torch::stable::contiguous(sample_ids);
  Tensor noise = torch::stable::new_empty(ids, {batch, elements}, ScalarType::Float);
  const auto* id = ids.const_data_ptr<int64_t>();
  auto* out = noise.mutable_data_ptr<float>();
  const int64_t grain = 1 + 4096 / std::max<int64_t>(elements, 1);  // samples worth a thread
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      fill_normal(out + b * elements, elements, static_cast<uint64_t>(seed),
                  static_cast<uint64_t>(id[b]), static_cast<uint32_t>(step));
    }
  });
  return noise;
}

}  // namespace attr_batch::cpu

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CPU, m) {
  m.impl("counter_normal", TORCH_BOX(&attr_batch::cpu::counter_normal));
}
