// pruned_conv2d on CUDA, forward and backward, without torch (device.cuh).
//
// All three are matrix products, one per model, in tiles of 64 x 64 whose sums stay in registers
// while the depth is walked in steps of 32. The step after the present one is on its way from
// memory to registers meanwhile, then goes to the other of two buffers in shared memory. bfloat16
// runs on tensor cores with float32 sums, float32 on plain fused multiply-adds.
//
//   forward      (pixels of y) x (outputs),  depth (r, s, input)
//   of input     (pixels of x) x (inputs),   depth (r, s, output): x's pixel gathers from grad's
//   of weight    (outputs) x (r, s, input),  depth (pixels of y), in parts that are added up after
//
// The matrix with a row per pixel exists nowhere: its entries are read where they lie, zero where
// the kernel hangs over the edge. Weights are packed before into the order they are used in.
#pragma once

#include <climits>

#include "device.cuh"

namespace attr_batch::cuda {

constexpr int kTile = 64, kDepth = 32;  // of a block's product, of a step
constexpr int kConvThreads = 128;

// Tiles in shared memory -------------------------------------------------------------------------

// Rows are padded by 16 bytes, so that the same 16 bytes of eight rows lie in different banks. A
// tile of the left matrix lies as (row, depth), or as (depth, row) where kTurned.
template <typename T, int kWidth>
struct Rows {
  static constexpr int kStride = kWidth + kVectorBytes / static_cast<int>(sizeof(T));
};

template <typename T, bool kTurned>
struct Stage {
  static constexpr int kLeftRows = kTurned ? kDepth : kTile;
  static constexpr int kLeftStride = Rows<T, (kTurned ? kTile : kDepth)>::kStride;
  static constexpr int kRightStride = Rows<T, kTile>::kStride;
  alignas(kVectorBytes) T left[kLeftRows * kLeftStride];
  alignas(kVectorBytes) T right[kDepth * kRightStride];
};

constexpr int kSumStride = Rows<float, kTile>::kStride;

template <typename T, bool kTurned>
union Tiles {
  Stage<T, kTurned> stage[2];
  float sum[kTile * kSumStride];
};

// The block's product: what a thread holds of it, one step, and its way to shared memory.
template <typename T, bool kTurned>
struct Product;

template <bool kTurned>
struct Product<float, kTurned> {
  static constexpr int kHigh = 8, kWide = 4;  // a thread's own part of the tile
  float sum[kHigh][kWide] = {};

  __device__ __forceinline__ int row() const { return threadIdx.x / (kTile / kWide) * kHigh; }
  __device__ __forceinline__ int column() const { return threadIdx.x % (kTile / kWide) * kWide; }

  __device__ __forceinline__ void add(const Stage<float, kTurned>& s) {
    for (int d = 0; d < kDepth; ++d) {
      float left[kHigh], right[kWide];
      for (int i = 0; i < kHigh; ++i) {
        left[i] = s.left[kTurned ? d * s.kLeftStride + row() + i : (row() + i) * s.kLeftStride + d];
      }
      for (int j = 0; j < kWide; ++j) right[j] = s.right[d * s.kRightStride + column() + j];
      for (int i = 0; i < kHigh; ++i) {
        for (int j = 0; j < kWide; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
      }
    }
  }

  __device__ __forceinline__ void store(float* to) const {
    for (int i = 0; i < kHigh; ++i) {
      for (int j = 0; j < kWide; ++j) to[(row() + i) * kSumStride + column() + j] = sum[i][j];
    }
  }
};

template <bool kTurned>
struct Product<__nv_bfloat16, kTurned> {
  static constexpr int kSide = 16, kOwn = 2;  // a warp's part is 2 x 2 of 16 x 16; 2 x 2 warps
  float sum[kOwn][2 * kOwn][4] = {};

  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int row(int i) const {
    return (threadIdx.x / kWarp / 2 * kOwn + i) * kSide;
  }
  __device__ __forceinline__ int column(int j) const {
    return (threadIdx.x / kWarp % 2 * kOwn + j) * kSide;
  }

  __device__ __forceinline__ void add(const Stage<__nv_bfloat16, kTurned>& s) {
    const int low = lane() % 16, high = lane() / 16 * 8;  // rows, then columns, of the four blocks
    for (int d = 0; d < kDepth; d += kSide) {
      uint32_t left[kOwn][4], right[kOwn][4];
      for (int i = 0; i < kOwn; ++i) {
        if constexpr (kTurned) {
          const int across = row(i) + low / 8 * 8;
          load_blocks<true>(left[i], s.left + (d + low % 8 + high) * s.kLeftStride + across);
        } else {
          load_blocks<false>(left[i], s.left + (row(i) + low) * s.kLeftStride + d + high);
        }
        load_blocks<true>(right[i], s.right + (d + low) * s.kRightStride + column(i) + high);
      }
      for (int i = 0; i < kOwn; ++i) {
        for (int j = 0; j < kOwn; ++j) {
          multiply_add(sum[i][2 * j], left[i], right[j][0], right[j][1]);
          multiply_add(sum[i][2 * j + 1], left[i], right[j][2], right[j][3]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* to) const {
    for (int i = 0; i < kOwn; ++i) {
      for (int j = 0; j < 2 * kOwn; ++j) {
        float* at = to + (row(i) + lane() / 4) * kSumStride + column(0) + 8 * j + lane() % 4 * 2;
        store_vector(at, Vector<float, 2>{sum[i][j][0], sum[i][j][1]});
        store_vector(at + 8 * kSumStride, Vector<float, 2>{sum[i][j][2], sum[i][j][3]});
      }
    }
  }
};

// Runs all steps and leaves the product in tiles.sum. `fetch(step)` reads this thread's part of a
// step from memory; `put(part, stage)` lays it down.
template <typename T, bool kTurned, typename Fetch, typename Put>
__device__ __forceinline__ void multiply(Tiles<T, kTurned>& tiles, int64_t steps, Fetch fetch,
                                         Put put) {
  Product<T, kTurned> product;
  if (steps > 0) put(fetch(0), tiles.stage[0]);
  __syncthreads();
  for (int64_t i = 0; i < steps; ++i) {
    if (i + 1 < steps) {
      const auto next = fetch(i + 1);
      product.add(tiles.stage[i % 2]);
      put(next, tiles.stage[(i + 1) % 2]);
    } else {
      product.add(tiles.stage[i % 2]);
    }
    __syncthreads();
  }
  product.store(tiles.sum);
  __syncthreads();
}

// A thread's part of a tile kRows x kColumns: vector `column` of every kApart-th row from `row`.
template <typename T, int V, int kRows, int kColumns>
struct Part {
  static constexpr int kAcross = kColumns / V, kApart = kConvThreads / kAcross;
  static constexpr int kCount = kRows / kApart;
  static_assert(kConvThreads % kAcross == 0 && kRows % kApart == 0);
  Vector<T, V> value[kCount];

  __device__ static __forceinline__ int column() { return threadIdx.x % kAcross * V; }
  __device__ static __forceinline__ int row(int i) { return threadIdx.x / kAcross + i * kApart; }

  __device__ __forceinline__ void put(T* to) const {
    for (int i = 0; i < kCount; ++i) {
      store_vector(to + row(i) * Rows<T, kColumns>::kStride + column(), value[i]);
    }
  }
};

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> zeros() {
  Vector<T, V> zero;
  for (int j = 0; j < V; ++j) zero.at[j] = narrow<T>(0.0f);
  return zero;
}

// Which pixels a kernel meets --------------------------------------------------------------------

// Where a pixel of one side meets the other side under tap (0, 0), and the first pixel there of its
// sample.
struct Meeting {
  int64_t first;
  int y, x;
};

constexpr int kNowhere = INT_MIN / 2;  // meets nothing under any tap

// What one side's pixels gather from the other's: y's from x's, or transposed x's from those of y's
// derivative.
struct Gather {
  int height, width;            // the gathering side
  int from_height, from_width;  // the other
  int channels;                 // of a pixel there
  int kernel_width, stride, padding;
  int64_t pixels;  // of one model, on the gathering side
  int depth;       // channels times taps

  template <bool kTransposed>
  __device__ __forceinline__ Meeting meeting(int64_t pixel, int64_t first_sample) const {
    if (pixel >= pixels) return {0, kNowhere, kNowhere};
    const auto p = static_cast<uint32_t>(pixel), image = static_cast<uint32_t>(height * width);
    const int64_t sample = first_sample + p / image;
    const int y = p % image / width, x = p % image % width;
    const int64_t first = sample * from_height * from_width;
    if (kTransposed) return {first, y + padding, x + padding};
    return {first, y * stride - padding, x * stride - padding};
  }

  // The coordinate under tap r, or -1.
  template <bool kTransposed>
  __device__ __forceinline__ int meet(int origin, int r, int size) const {
    int at = kTransposed ? origin - r : origin + r;
    if (at < 0) return -1;
    if (kTransposed) {
      if (at % stride != 0) return -1;
      at /= stride;
    }
    return at < size ? at : -1;
  }

  // V entries of the matrix, in the row that `m` stands for: those of a tap, from a channel on.
  template <int V, bool kTransposed, typename T>
  __device__ __forceinline__ Vector<T, V> read(const Pair<const T>& from, const Meeting& m, int tap,
                                               int channel) const {
    const int y = meet<kTransposed>(m.y, tap / kernel_width, from_height);
    const int x = meet<kTransposed>(m.x, tap % kernel_width, from_width);
    if (y < 0 || x < 0) return zeros<T, V>();
    return load_vector<V>(from.at(m.first + static_cast<int64_t>(y) * from_width + x, channel));
  }
};

// Forward, and the derivative in the input -------------------------------------------------------

template <typename T>
struct Operands {
  Pair<const T> in;
  const T* weight;    // packed (K, depth, columns), both rounded up
  const T* bias;      // (K, columns) or null
  const T* residual;  // like out, or null
  Pair<T> out;
  int columns;
  int64_t samples;  // of one model
};

template <typename T>
struct ConvShared {
  Tiles<T, false> tiles;
  Meeting meeting[kTile];
};

template <typename T, int V, bool kTransposed>
__global__ void __launch_bounds__(kConvThreads) conv_kernel(const Gather g, const Operands<T> o) {
  using Left = Part<T, V, kTile, kDepth>;
  using Right = Part<T, kVectorBytes / sizeof(T), kDepth, kTile>;
  struct Parts {
    Left left;
    Right right;
  };
  auto& shared = *reinterpret_cast<ConvShared<T>*>(shared_memory());
  const int64_t model = blockIdx.z, first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_column = blockIdx.y * kTile;
  const int64_t padded = round_up(kTile, o.columns);
  const T* weight = o.weight + model * round_up(kDepth, g.depth) * padded + first_column;

  for (int i = threadIdx.x; i < kTile; i += kConvThreads) {
    shared.meeting[i] = g.meeting<kTransposed>(first_row + i, model * o.samples);
  }
  __syncthreads();

  const auto fetch = [&](int64_t step) {
    Parts parts;
    const int d = static_cast<int>(step) * kDepth + Left::column();
    const int tap = d / g.channels, channel = d % g.channels;
    for (int i = 0; i < Left::kCount; ++i) {
      parts.left.value[i] =
          d < g.depth ? g.read<V, kTransposed>(o.in, shared.meeting[Left::row(i)], tap, channel)
                      : zeros<T, V>();
    }
    for (int i = 0; i < Right::kCount; ++i) {
      const int64_t row = step * kDepth + Right::row(i);
      parts.right.value[i] =
          load_vector<kVectorBytes / sizeof(T)>(weight + row * padded + Right::column());
    }
    return parts;
  };
  const auto put = [&](const Parts& parts, Stage<T, false>& stage) {
    parts.left.put(stage.left);
    parts.right.put(stage.right);
  };
  multiply<T, false>(shared.tiles, blocks_of(kDepth, g.depth), fetch, put);

  const int64_t first_pixel = model * g.pixels;
  for (int i = threadIdx.x; i < kTile * kTile; i += kConvThreads) {
    const int column = first_column + i % kTile;
    const int64_t row = first_row + i / kTile;
    if (column >= o.columns || row >= g.pixels) continue;
    float sum = shared.tiles.sum[i / kTile * kSumStride + i % kTile];
    if (o.bias != nullptr) sum += widen(o.bias[model * o.columns + column]);
    if (o.residual != nullptr) {
      sum += widen(o.residual[(first_pixel + row) * o.columns + column]);
    }
    *o.out.at(first_pixel + row, column) = narrow<T>(sum);
  }
}

// (K, O, I, taps), anyhow strided, to (K, depth, columns): depth (tap, I) and columns O, or
// transposed depth (tap, O) and columns I; zero up to whole tiles.
struct Packing {
  int outputs, inputs, kernel_height, kernel_width;
  int64_t stride[5];
  bool transposed;

  ATTR_BATCH_HD int channels() const { return transposed ? outputs : inputs; }
  ATTR_BATCH_HD int columns() const { return transposed ? inputs : outputs; }
  ATTR_BATCH_HD int depth() const { return kernel_height * kernel_width * channels(); }
  ATTR_BATCH_HD int64_t size() const {  // of one model
    return round_up(kDepth, depth()) * round_up(kTile, columns());
  }
};

template <typename T>
__global__ void pack_kernel(const Packing p, int64_t models, const T* __restrict__ weight,
                            T* __restrict__ packed) {
  const int64_t padded = round_up(kTile, p.columns()), size = p.size();
  for (int64_t t = first_thread(); t < models * size; t += thread_count()) {
    const int column = static_cast<int>(t % padded), d = static_cast<int>(t % size / padded);
    T value = narrow<T>(0.0f);
    if (column < p.columns() && d < p.depth()) {
      const int tap = d / p.channels(), channel = d % p.channels();
      const int output = p.transposed ? channel : column, input = p.transposed ? column : channel;
      value = weight[t / size * p.stride[0] + output * p.stride[1] + input * p.stride[2] +
                     tap / p.kernel_width * p.stride[3] + tap % p.kernel_width * p.stride[4]];
    }
    packed[t] = value;
  }
}

// The derivative in the weight -------------------------------------------------------------------

template <typename T>
struct WeightShared {
  Tiles<T, true> tiles;
  Meeting meeting[2][kDepth];
};

// Writes part[split][model][output][d], d = (r, s, input). A split takes `steps` steps of pixels.
template <typename T, int V>
__global__ void __launch_bounds__(kConvThreads)
    weight_kernel(const Gather g, const Pair<const T> in, const T* __restrict__ grad, int outputs,
                  int models, int64_t samples, int64_t steps, float* __restrict__ part) {
  using Side = Part<T, V, kDepth, kTile>;
  struct Parts {
    Side left, right;
  };
  auto& shared = *reinterpret_cast<WeightShared<T>*>(shared_memory());
  const int first_output = blockIdx.x * kTile, first_d = blockIdx.y * kTile;
  const int64_t model = blockIdx.z % models, split = blockIdx.z / models;
  const int64_t all_steps = blocks_of(kDepth, g.pixels), first_step = split * steps;
  const int64_t own_steps = min(steps, all_steps - first_step);
  const int output = first_output + Side::column(), d = first_d + Side::column();
  const int tap = d / g.channels, channel = d % g.channels;

  const auto meet_pixels = [&](int64_t step) {
    if (threadIdx.x < kDepth) {
      shared.meeting[step % 2][threadIdx.x] =
          g.meeting<false>((first_step + step) * kDepth + threadIdx.x, model * samples);
    }
  };
  meet_pixels(0);
  __syncthreads();

  const auto fetch = [&](int64_t step) {
    meet_pixels(step + 1);  // `multiply` has a barrier between any two calls
    Parts parts;
    for (int i = 0; i < Side::kCount; ++i) {
      const int row = Side::row(i);
      const int64_t pixel = (first_step + step) * kDepth + row;
      const T* from = grad + (model * g.pixels + pixel) * outputs + output;
      parts.left.value[i] =
          pixel < g.pixels && output < outputs ? load_vector<V>(from) : zeros<T, V>();
      parts.right.value[i] = d < g.depth
                                 ? g.read<V, false>(in, shared.meeting[step % 2][row], tap, channel)
                                 : zeros<T, V>();
    }
    return parts;
  };
  const auto put = [&](const Parts& parts, Stage<T, true>& stage) {
    parts.left.put(stage.left);
    parts.right.put(stage.right);
  };
  multiply<T, true>(shared.tiles, own_steps, fetch, put);

  float* to = part + (split * models + model) * outputs * g.depth;
  for (int i = threadIdx.x; i < kTile * kTile; i += kConvThreads) {
    const int row = first_output + i / kTile, column = first_d + i % kTile;
    if (row >= outputs || column >= g.depth) continue;
    to[static_cast<int64_t>(row) * g.depth + column] =
        shared.tiles.sum[i / kTile * kSumStride + i % kTile];
  }
}

// Adds up the splits, in order, into (K, O, I, R, S).
template <typename T>
__global__ void weight_sum_kernel(const float* __restrict__ part, int64_t rows, int channels,
                                  int taps, int64_t splits, T* __restrict__ out) {
  const int depth = channels * taps;
  for (int64_t t = first_thread(); t < rows * depth; t += thread_count()) {
    const int channel = static_cast<int>(t % depth / taps), tap = static_cast<int>(t % taps);
    const float* from = part + t / depth * depth + tap * channels + channel;
    float sum = 0.0f;
    for (int64_t split = 0; split < splits; ++split) sum += from[split * rows * depth];
    out[t] = narrow<T>(sum);
  }
}

// What the host launches -------------------------------------------------------------------------

struct ConvShape {
  int64_t batch;
  int models, height, width;   // of x
  int first, second, outputs;  // channels of x, of skip, of y
  int kernel_height, kernel_width, stride, padding;

  int inputs() const { return first + second; }
  int taps() const { return kernel_height * kernel_width; }
  int out_height() const { return (height + 2 * padding - kernel_height) / stride + 1; }
  int out_width() const { return (width + 2 * padding - kernel_width) / stride + 1; }
  int64_t samples() const { return batch / models; }
  int64_t out_pixels() const { return samples() * out_height() * out_width(); }  // of one model
  int64_t in_pixels() const { return samples() * height * width; }

  Gather forward() const {
    return {out_height(), out_width(), height,  width,        inputs(),
            kernel_width, stride,      padding, out_pixels(), inputs() * taps()};
  }
  Gather transposed() const {
    return {height,       width,  out_height(), out_width(), outputs,
            kernel_width, stride, padding,      in_pixels(), outputs * taps()};
  }
};

// Blocks enough for any GPU twice over, but no split shorter than eight steps. The shape alone
// decides, not the GPU, so that a sum's order is the same on all.
struct WeightPlan {
  int64_t splits, steps;

  explicit WeightPlan(const ConvShape& s) {
    constexpr int64_t kBlocks = 512, kSteps = 8;
    const int64_t tiles =
        s.models * blocks_of(kTile, s.outputs) * blocks_of(kTile, s.inputs() * s.taps());
    const int64_t all = std::max<int64_t>(blocks_of(kDepth, s.out_pixels()), 1);
    const int64_t wanted =
        std::min(blocks_of(std::max<int64_t>(tiles, 1), kBlocks), blocks_of(kSteps, all));
    steps = blocks_of(wanted, all);
    splits = blocks_of(steps, all);
  }
};

// Floats of memory that `weight_on` needs between its two kernels.
inline int64_t part_size(const ConvShape& s) {
  return WeightPlan(s).splits * s.models * s.outputs * s.inputs() * s.taps();
}

template <typename T>
void pack_on(cudaStream_t stream, const Packing& p, int models, const T* weight, T* packed) {
  launch(pack_kernel<T>, dim3(grid_size(models * p.size())), kThreads, 0, stream, p, models, weight,
         packed);
}

template <typename T, bool kTransposed>
void conv_on(cudaStream_t stream, const Gather& g, const Operands<T>& o, int models) {
  const dim3 grid(static_cast<unsigned>(blocks_of(kTile, g.pixels)),
                  static_cast<unsigned>(blocks_of(kTile, o.columns)),
                  static_cast<unsigned>(models));
  with_vectors<T>({o.in.first_width, o.in.second_width}, [&](auto vector) {
    launch(conv_kernel<T, decltype(vector)::value, kTransposed>, grid, kConvThreads,
           sizeof(ConvShared<T>), stream, g, o);
  });
}

template <typename T>
void weight_on(cudaStream_t stream, const ConvShape& s, const Pair<const T>& in, const T* grad,
               float* part, T* out) {
  const WeightPlan plan(s);
  const Gather g = s.forward();
  const dim3 grid(static_cast<unsigned>(blocks_of(kTile, s.outputs)),
                  static_cast<unsigned>(blocks_of(kTile, g.depth)),
                  static_cast<unsigned>(s.models * plan.splits));
  with_vectors<T>({in.first_width, in.second_width, s.outputs}, [&](auto vector) {
    launch(weight_kernel<T, decltype(vector)::value>, grid, kConvThreads, sizeof(WeightShared<T>),
           stream, g, in, grad, s.outputs, s.models, s.samples(), plan.steps, part);
  });
  const int64_t rows = static_cast<int64_t>(s.models) * s.outputs;
  launch(weight_sum_kernel<T>, dim3(grid_size(rows * g.depth)), kThreads, 0, stream, part, rows,
         s.inputs(), s.taps(), plan.splits, out);
}

}  // namespace attr_batch::cuda
