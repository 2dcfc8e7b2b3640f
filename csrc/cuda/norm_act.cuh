// norm_act on CUDA, forward and backward, without torch (device.cuh).
//
// A block owns a few neighbouring groups of one sample, enough that a pixel's channels fill whole
// memory sectors, and all its pixels. A thread owns some of the channels (a vector, one 16-byte
// load) at every so many pixels; it reads them once, and what it will need again it keeps in shared
// memory where that holds them, else the second-level cache must serve. Sums run over a thread's
// pixels, then over threads pairwise, then over a group's channels: an order that the sample's
// shape alone decides, so neither batch nor cohort nor GPU can change a bit.
#pragma once

#include <numeric>

#include "../norm.h"
#include "../silu.h"
#include "device.cuh"

namespace attr_batch::cuda {

constexpr int kNormShared = 96 * 1024;  // bytes a block may use: what every GPU since sm_80 has
constexpr int kMaxGroupWidth = 8000;    // channels; three sums of each must fit besides

// Everything is channels_last and starts at a multiple of 16 bytes; parameters are float32.
template <typename T>
struct NormAct {
  Pair<const T> in;
  const float *weight, *bias;        // (K, C)
  const float *add, *scale, *shift;  // (B, C) or null
  int64_t batch;
  int models, pixels, groups;
  bool silu;

  ATTR_BATCH_HD int channels() const { return in.first_width + in.second_width; }
};

struct NormPlan {
  int groups;           // of a block; the last block of a sample may have fewer
  int64_t blocks;       // of a sample
  int64_t kept_bytes;   // per tensor in shared memory; 0: read it again
  size_t shared_bytes;  // in all
};

// `tensors` are read twice, `sums` are made per channel, V channels are a thread's.
inline NormPlan norm_plan(int64_t element_bytes, int V, int64_t channels, int64_t groups,
                          int64_t pixels, int64_t tensors, int64_t sums) {
  const int64_t group = channels / groups;
  const int64_t whole = V / std::gcd<int64_t>(V, group);  // groups that fill vectors
  NormPlan plan;
  for (const int64_t bytes : {64, 32, 64}) {  // of a pixel: as wide as can be kept, else wide
    const int64_t wanted = whole * blocks_of(whole * group * element_bytes, bytes);
    plan.groups = static_cast<int>(std::min(wanted, groups));
    plan.blocks = blocks_of(plan.groups, groups);
    const int64_t width = plan.groups * group;
    const int64_t partials = sums * std::max<int64_t>(kThreads * V, width);
    const int64_t others = sizeof(float) * (partials + 2 * plan.groups);
    plan.kept_bytes = round_up(kVectorBytes, pixels * width * element_bytes);
    plan.shared_bytes = tensors * plan.kept_bytes + others;
    if (plan.shared_bytes <= kNormShared) return plan;
    plan.kept_bytes = 0;
    plan.shared_bytes = others;
  }
  return plan;
}

// What of a sample is this block's and this thread's: vectors `lane`, lane + kThreads, ... of a
// pixel (more than one only where a block is wider than its threads) at pixels row, row + rows, ...
template <int V>
struct NormShare {
  int64_t sample, first_pixel, model;
  int channel, width, groups, group_width;
  int lanes, lane, rows, row;

  template <typename T>
  __device__ __forceinline__ NormShare(const NormAct<T>& a, const NormPlan& plan) {
    sample = blockIdx.x / plan.blocks;
    first_pixel = sample * a.pixels;
    model = sample / (a.batch / a.models);
    const int first_group = static_cast<int>(blockIdx.x % plan.blocks) * plan.groups;
    groups = min(plan.groups, a.groups - first_group);
    group_width = a.channels() / a.groups;
    channel = first_group * group_width;
    width = groups * group_width;
    lanes = width / V;
    rows = max(1, kThreads / lanes);
    row = static_cast<int>(threadIdx.x) / lanes;
    lane = static_cast<int>(threadIdx.x) % lanes;
    if (row >= rows) lane = lanes;  // a thread left over: nothing is its own
  }
};

template <typename T>
__device__ __forceinline__ float number(const T* values, int64_t i) {
  return values == nullptr ? 0.0f : values[i];
}

template <typename T>
__device__ __forceinline__ Affine<float> channel_affine(const NormAct<T>& a, int64_t sample,
                                                        int64_t model, int channel) {
  const int64_t own = sample * a.channels() + channel, of_model = model * a.channels() + channel;
  return affine(a.weight[of_model], a.bias[of_model], number(a.scale, own), number(a.shift, own));
}

// Adds up rows (rows, width) into the first, pairwise; ends with all threads in step.
__device__ inline void sum_rows(float* rows_of, int rows, int width) {
  __syncthreads();
  while (rows > 1) {
    const int upper = rows / 2, lower = rows - upper;
    for (int i = threadIdx.x; i < upper * width; i += kThreads) {
      rows_of[i] += rows_of[lower * width + i];
    }
    rows = lower;
    __syncthreads();
  }
}

// The sum of value(0), ..., value(n - 1), for all threads of a warp.
template <typename F>
__device__ __forceinline__ float warp_sum(int n, F value) {
  float sum = 0.0f;
  for (int i = threadIdx.x % kWarp; i < n; i += kWarp) sum += value(i);
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, apart);
  }
  return sum;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    norm_act_kernel(const NormAct<T> a, const NormPlan plan, float eps, T* __restrict__ y,
                    float* __restrict__ stats) {
  const NormShare<V> s(a, plan);
  auto* kept = reinterpret_cast<Vector<T, V>*>(shared_memory());
  auto* of_group = reinterpret_cast<float*>(shared_memory() + plan.kept_bytes);
  float* partial = of_group + 2 * plan.groups;
  const bool keeps = plan.kept_bytes > 0;
  const float count = static_cast<float>(s.group_width) * static_cast<float>(a.pixels);
  const int warp = threadIdx.x / kWarp;
  const auto add = [&](int c) { return number(a.add, s.sample * a.channels() + s.channel + c); };

  for (int lane = s.lane; lane < s.lanes; lane += kThreads) {
    float sum[V] = {}, added[V];
    for (int j = 0; j < V; ++j) added[j] = add(lane * V + j);
    for (int p = s.row; p < a.pixels; p += s.rows) {
      const auto x = load_vector<V>(a.in.at(s.first_pixel + p, s.channel + lane * V));
      if (keeps) kept[p * s.lanes + lane] = x;
      for (int j = 0; j < V; ++j) sum[j] += widen(x.at[j]) + added[j];
    }
    for (int j = 0; j < V; ++j) partial[s.row * s.width + lane * V + j] = sum[j];
  }
  sum_rows(partial, s.rows, s.width);
  for (int g = warp; g < s.groups; g += kThreads / kWarp) {
    const float sum =
        warp_sum(s.group_width, [&](int c) { return partial[g * s.group_width + c]; });
    of_group[2 * g] = sum / count;
  }
  __syncthreads();

  const auto read = [&](int p, int lane) {
    return keeps ? kept[p * s.lanes + lane]
                 : load_vector<V>(a.in.at(s.first_pixel + p, s.channel + lane * V));
  };
  for (int lane = s.lane; lane < s.lanes; lane += kThreads) {
    float sum[V] = {}, added[V], mean[V];
    for (int j = 0; j < V; ++j) {
      added[j] = add(lane * V + j);
      mean[j] = of_group[2 * ((lane * V + j) / s.group_width)];
    }
    for (int p = s.row; p < a.pixels; p += s.rows) {
      const auto x = read(p, lane);
      for (int j = 0; j < V; ++j) {
        const float centred = (widen(x.at[j]) + added[j]) - mean[j];
        sum[j] += centred * centred;
      }
    }
    for (int j = 0; j < V; ++j) partial[s.row * s.width + lane * V + j] = sum[j];
  }
  sum_rows(partial, s.rows, s.width);
  for (int g = warp; g < s.groups; g += kThreads / kWarp) {
    const float sum =
        warp_sum(s.group_width, [&](int c) { return partial[g * s.group_width + c]; });
    if (threadIdx.x % kWarp != 0) continue;
    const float rstd = inverse_root(sum / count + eps);
    const int64_t at = s.sample * a.groups + s.channel / s.group_width + g;
    stats[2 * at] = of_group[2 * g];
    stats[2 * at + 1] = of_group[2 * g + 1] = rstd;
  }
  __syncthreads();

  for (int lane = s.lane; lane < s.lanes; lane += kThreads) {
    float added[V], mean[V], rstd[V], gain[V], offset[V];
    for (int j = 0; j < V; ++j) {
      const int c = lane * V + j, g = c / s.group_width;
      added[j] = add(c);
      mean[j] = of_group[2 * g];
      rstd[j] = of_group[2 * g + 1];
      const auto to_z = channel_affine(a, s.sample, s.model, s.channel + c);
      gain[j] = to_z.gain;
      offset[j] = to_z.offset;
    }
    for (int p = s.row; p < a.pixels; p += s.rows) {
      auto value = read(p, lane);
      for (int j = 0; j < V; ++j) {
        const float n = ((widen(value.at[j]) + added[j]) - mean[j]) * rstd[j];
        const float z = gain[j] * n + offset[j];
        value.at[j] = narrow<T>(a.silu ? silu(z) : z);
      }
      store_vector(y + (s.first_pixel + p) * a.channels() + s.channel + lane * V, value);
    }
  }
}

// The sum of dh over pixels follows from those of d, d n and n, without another pass.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    norm_act_backward_kernel(const NormAct<T> a, const NormPlan plan, const T* __restrict__ grad,
                             const float* __restrict__ stats, Pair<T> out,
                             float* __restrict__ sums) {
  const NormShare<V> s(a, plan);
  auto* kept_x = reinterpret_cast<Vector<T, V>*>(shared_memory());
  auto* kept_grad = reinterpret_cast<Vector<T, V>*>(shared_memory() + plan.kept_bytes);
  auto* of_group = reinterpret_cast<float*>(shared_memory() + 2 * plan.kept_bytes);
  float* partial = of_group + 2 * plan.groups;
  const bool keeps = plan.kept_bytes > 0;
  const float count = static_cast<float>(s.group_width) * static_cast<float>(a.pixels);
  const int first_group = s.channel / s.group_width;
  const float* stats_of = stats + 2 * (s.sample * a.groups + first_group);

  struct Constants {
    float added[V], mean[V], rstd[V], gain[V], offset[V];
  };
  const auto constants = [&](int lane) {
    Constants k;
    for (int j = 0; j < V; ++j) {
      const int c = s.channel + lane * V + j, g = c / s.group_width - first_group;
      k.added[j] = number(a.add, s.sample * a.channels() + c);
      k.mean[j] = stats_of[2 * g];
      k.rstd[j] = stats_of[2 * g + 1];
      const auto to_z = channel_affine(a, s.sample, s.model, c);
      k.gain[j] = to_z.gain;
      k.offset[j] = to_z.offset;
    }
    return k;
  };
  const auto load_x = [&](int p, int lane) {
    return load_vector<V>(a.in.at(s.first_pixel + p, s.channel + lane * V));
  };
  const auto load_grad = [&](int p, int lane) {
    return load_vector<V>(grad + (s.first_pixel + p) * a.channels() + s.channel + lane * V);
  };
  const auto normalised = [](const Constants& k, int j, T x) {
    return ((widen(x) + k.added[j]) - k.mean[j]) * k.rstd[j];
  };
  const auto of_z = [&](const Constants& k, int j, float n, T of_y) {
    const float d = widen(of_y);
    return a.silu ? d * silu_derivative(k.gain[j] * n + k.offset[j]) : d;
  };

  for (int lane = s.lane; lane < s.lanes; lane += kThreads) {
    const Constants k = constants(lane);
    float sum_d[V] = {}, sum_dn[V] = {}, sum_n[V] = {};
    for (int p = s.row; p < a.pixels; p += s.rows) {
      const auto x = load_x(p, lane), of_y = load_grad(p, lane);
      if (keeps) {
        kept_x[p * s.lanes + lane] = x;
        kept_grad[p * s.lanes + lane] = of_y;
      }
      for (int j = 0; j < V; ++j) {
        const float n = normalised(k, j, x.at[j]), d = of_z(k, j, n, of_y.at[j]);
        sum_d[j] += d;
        sum_dn[j] += d * n;
        sum_n[j] += n;
      }
    }
    float* own = partial + 3 * s.row * s.width + lane * V;
    for (int j = 0; j < V; ++j) {
      own[j] = sum_d[j];
      own[s.width + j] = sum_dn[j];
      own[2 * s.width + j] = sum_n[j];
    }
  }
  sum_rows(partial, s.rows, 3 * s.width);
  const float *all_d = partial, *all_dn = partial + s.width, *all_n = partial + 2 * s.width;
  const auto gain = [&](int c) { return channel_affine(a, s.sample, s.model, s.channel + c).gain; };
  for (int g = threadIdx.x / kWarp; g < s.groups; g += kThreads / kWarp) {
    const int c0 = g * s.group_width;
    const auto mean = [&](const float* of) {
      return warp_sum(s.group_width, [&](int c) { return gain(c0 + c) * of[c0 + c]; }) / count;
    };
    of_group[2 * g] = mean(all_d);
    of_group[2 * g + 1] = mean(all_dn);
  }
  __syncthreads();

  float* sums_of = sums + 3 * s.sample * a.channels() + s.channel;
  for (int c = threadIdx.x; c < s.width; c += kThreads) {
    const int g = c / s.group_width;
    const float mean_g = of_group[2 * g], mean_gn = of_group[2 * g + 1];
    const float rest = static_cast<float>(a.pixels) * mean_g + mean_gn * all_n[c];
    sums_of[c] = all_d[c];
    sums_of[a.channels() + c] = all_dn[c];
    sums_of[2 * a.channels() + c] = stats_of[2 * g + 1] * (gain(c) * all_d[c] - rest);
  }

  for (int lane = s.lane; lane < s.lanes; lane += kThreads) {
    const Constants k = constants(lane);
    float mean_g[V], mean_gn[V];
    for (int j = 0; j < V; ++j) {
      const int g = (lane * V + j) / s.group_width;
      mean_g[j] = of_group[2 * g];
      mean_gn[j] = of_group[2 * g + 1];
    }
    for (int p = s.row; p < a.pixels; p += s.rows) {
      auto value = keeps ? kept_x[p * s.lanes + lane] : load_x(p, lane);
      const auto of_y = keeps ? kept_grad[p * s.lanes + lane] : load_grad(p, lane);
      for (int j = 0; j < V; ++j) {
        const float n = normalised(k, j, value.at[j]), d = of_z(k, j, n, of_y.at[j]);
        value.at[j] = narrow<T>(k.rstd[j] * ((k.gain[j] * d - mean_g[j]) - n * mean_gn[j]));
      }
      store_vector(out.at(s.first_pixel + p, s.channel + lane * V), value);
    }
  }
}

template <typename T>
void norm_act_on(cudaStream_t stream, const NormAct<T>& a, float eps, T* y, float* stats) {
  with_vectors<T>({a.in.first_width, a.in.second_width}, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const NormPlan plan = norm_plan(sizeof(T), V, a.channels(), a.groups, a.pixels, 1, 1);
    launch(norm_act_kernel<T, V>, dim3(static_cast<unsigned>(a.batch * plan.blocks)), kThreads,
           plan.shared_bytes, stream, a, plan, eps, y, stats);
  });
}

template <typename T>
void norm_act_backward_on(cudaStream_t stream, const NormAct<T>& a, const T* grad,
                          const float* stats, const Pair<T>& out, float* sums) {
  with_vectors<T>({a.in.first_width, a.in.second_width}, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const NormPlan plan = norm_plan(sizeof(T), V, a.channels(), a.groups, a.pixels, 2, 3);
    launch(norm_act_backward_kernel<T, V>, dim3(static_cast<unsigned>(a.batch * plan.blocks)),
           kThreads, plan.shared_bytes, stream, a, plan, grad, stats, out, sums);
  });
}

}  // namespace attr_batch::cuda
