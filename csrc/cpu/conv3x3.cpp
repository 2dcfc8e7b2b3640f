// conv3x3 on the CPU: float32 3x3 convolutions of stride 1 and padding 1 in NHWC by Winograd's
// F(4x4, 3x3), where oneDNN multiplies directly. A chunk of tiles at a time goes through its three
// stages (transform, 36 small matrix products, transform back) without leaving the second-level
// cache. A tile's result does not depend on its neighbours in the batch, so neither do the bits.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string_view>

#include "../conv3x3_arguments.h"
#include "winograd.h"

// Products may be fused here: no bit is shared with another back end.
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace attr_batch::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunkFloats = 1 << 17;  // of both operands of a chunk's products: half a MiB

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float HalfLanes __attribute__((vector_size(2 * kLanes)));

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

ATTR_BATCH_HD Lanes load(const float* from, int64_t count) {
  Lanes v = {};
  if (count >= kLanes) {
    std::memcpy(&v, from, sizeof v);
  } else {
    for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  }
  return v;
}

ATTR_BATCH_HD void store(float* to, const Lanes& v, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(to, &v, sizeof v);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = v[i];
  }
}

// The images as tiles of 4x4 outputs.
struct Tiling {
  int64_t height, width, rows, columns;
  Tiling(int64_t h, int64_t w)
      : height(h), width(w), rows(round_up(h, 4) / 4), columns(round_up(w, 4) / 4) {}
  int64_t per_image() const { return rows * columns; }
};

// Where tile `t` begins: its image and first output.
struct Corner {
  int64_t image, y, x;
};

ATTR_BATCH_HD Corner corner(const Tiling& g, int64_t t) {
  const int64_t in_image = t % (g.rows * g.columns);
  return {t / (g.rows * g.columns), in_image / g.columns * kTileOut,
          in_image % g.columns * kTileOut};
}

// A transform of both dimensions of a square of vectors: `f` takes N values to M.
template <int N, int M, typename F>
ATTR_BATCH_HD void both_ways(const Lanes (&from)[N][N], Lanes (&to)[M][M], F f) {
  Lanes half[N][M];
  for (int i = 0; i < N; ++i) f(from[i], half[i]);
  for (int j = 0; j < M; ++j) {
    Lanes column[N], out[M];
    for (int i = 0; i < N; ++i) column[i] = half[i][j];
    f(column, out);
    for (int i = 0; i < M; ++i) to[i][j] = out[i];
  }
}

// The N x N pixels from (y, x) on, zeros outside the image.
template <int N>
ATTR_BATCH_HD void read_patch(const float* image, const Tiling& g, int64_t channels, int64_t y,
                              int64_t x, int64_t c, Lanes (&patch)[N][N]) {
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < N; ++j) {
      const int64_t row = y + i, column = x + j;
      const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
      patch[i][j] =
          inside ? load(image + (row * g.width + column) * channels + c, channels - c) : Lanes{};
    }
  }
}

// points[p][t][c] = (B^T d B)_p of tiles begin .. end - 1.
ATTR_BATCH_HD void read_inputs(const float* x, const Tiling& g, int64_t channels, int64_t begin,
                               int64_t end, float* points, int64_t stride, int64_t plane) {
  for (int64_t t = begin; t < end; ++t) {
    const Corner at = corner(g, t);
    const float* image = x + at.image * g.height * g.width * channels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Lanes patch[kTileIn][kTileIn], out[kTileIn][kTileIn];
      read_patch(image, g, channels, at.y - 1, at.x - 1, c, patch);
      both_ways(patch, out, [](const Lanes* d, Lanes* o) __attribute__((always_inline)) {
        input_points(d, o);
      });
      for (int p = 0; p < kPoints; ++p) {
        store(points + p * plane + (t - begin) * stride + c, out[p / kTileIn][p % kTileIn], kLanes);
      }
    }
  }
}

// points[p][t][o] = (A dY A^T)_p of tiles begin .. end - 1.
ATTR_BATCH_HD void read_gradients(const float* grad, const Tiling& g, int64_t channels,
                                  int64_t begin, int64_t end, float* points, int64_t stride,
                                  int64_t plane) {
  for (int64_t t = begin; t < end; ++t) {
    const Corner at = corner(g, t);
    const float* image = grad + at.image * g.height * g.width * channels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Lanes patch[kTileOut][kTileOut], out[kTileIn][kTileIn];
      read_patch(image, g, channels, at.y, at.x, c, patch);
      both_ways(patch, out, [](const Lanes* d, Lanes* o) __attribute__((always_inline)) {
        gradient_points(d, o);
      });
      for (int p = 0; p < kPoints; ++p) {
        store(points + p * plane + (t - begin) * stride + c, out[p / kTileIn][p % kTileIn], kLanes);
      }
    }
  }
}

// y = A^T m A + bias + residual for tiles begin .. end - 1.
ATTR_BATCH_HD void write_outputs(float* y, const Tiling& g, int64_t channels, int64_t begin,
                                 int64_t end, const float* points, int64_t stride, int64_t plane,
                                 const float* bias, const float* residual) {
  for (int64_t t = begin; t < end; ++t) {
    const Corner at = corner(g, t);
    const int64_t image = at.image * g.height * g.width * channels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Lanes m[kTileIn][kTileIn], out[kTileOut][kTileOut];
      for (int p = 0; p < kPoints; ++p) {
        m[p / kTileIn][p % kTileIn] = load(points + p * plane + (t - begin) * stride + c, kLanes);
      }
      both_ways(m, out, [](const Lanes* d, Lanes* o) __attribute__((always_inline)) {
        output_points(d, o);
      });
      const Lanes b = bias == nullptr ? Lanes{} : load(bias + c, channels - c);
      const int64_t rows = std::min<int64_t>(kTileOut, g.height - at.y);
      const int64_t columns = std::min<int64_t>(kTileOut, g.width - at.x);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t pixel = image + ((at.y + i) * g.width + at.x + j) * channels + c;
          Lanes v = out[i][j] + b;
          if (residual != nullptr) v += load(residual + pixel, channels - c);
          store(y + pixel, v, channels - c);
        }
      }
    }
  }
}

// C[r][n] (+)= sum_k A[r * a_row + k * a_k] B[k * b_k + n] for `kRows` rows and two vectors n.
template <typename V, int kRows>
ATTR_BATCH_HD void multiply_block(const float* a, int64_t a_row, int64_t a_k, const float* b,
                                  int64_t b_k, float* c, int64_t c_row, int64_t depth, bool add) {
  constexpr int64_t kWidth = sizeof(V) / 4;
  V sums[kRows][2];
  ATTR_BATCH_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = V{};
    sums[r][1] = V{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    V b0, b1;
    std::memcpy(&b0, b + k * b_k, sizeof b0);
    std::memcpy(&b1, b + k * b_k + kWidth, sizeof b1);
    ATTR_BATCH_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V value = a[r * a_row + k * a_k] - V{};
      sums[r][0] += value * b0;
      sums[r][1] += value * b1;
    }
  }
  ATTR_BATCH_UNROLL
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      float* out = c + r * c_row + half * kWidth;
      V v = sums[r][half];
      if (add) {
        V before;
        std::memcpy(&before, out, sizeof before);
        v += before;
      }
      std::memcpy(out, &v, sizeof v);
    }
  }
}

// One point's matrix product: rows x depth times depth x columns.
struct Product {
  const float* a;
  int64_t a_row, a_k;
  const float* b;
  int64_t b_k, b_panel;  // from one panel of columns to the next
  float* c;
  int64_t c_row, rows, columns, depth;
  bool add;
};

template <typename V, int kRows>
ATTR_BATCH_HD void multiply(const Product& p) {
  constexpr int64_t kPanel = 2 * sizeof(V) / 4;
  for (int64_t n = 0; n < p.columns; n += kPanel) {
    const float* b = p.b + n / kPanel * p.b_panel;
    for (int64_t r = 0; r < p.rows; r += kRows) {
      multiply_block<V, kRows>(p.a + r * p.a_row, p.a_row, p.a_k, b, p.b_k, p.c + r * p.c_row + n,
                               p.c_row, p.depth, p.add);
    }
  }
}

// weight (O, I, 3, 3) to points[p][panel of outputs][I][panel], outputs padded with zeros.
template <int64_t kPanel>
ATTR_BATCH_HD void read_weights(const float* weight, int64_t outputs, int64_t inputs,
                                int64_t padded, float* points) {
  constexpr int64_t kPiece = std::min(kLanes, kPanel);
  for (int64_t o = 0; o < padded; o += kLanes) {
    const int64_t lanes = std::min(kLanes, outputs - o);
    for (int64_t i = 0; i < inputs; ++i) {
      float taps[9][kLanes] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float* w = weight + ((o + lane) * inputs + i) * 9;
        for (int tap = 0; tap < 9; ++tap) taps[tap][lane] = w[tap];
      }
      Lanes g[3][3], u[kTileIn][kTileIn];
      std::memcpy(&g, taps, sizeof g);
      both_ways(g, u, [](const Lanes* d, Lanes* out) __attribute__((always_inline)) {
        weight_points(d, out);
      });
      for (int p = 0; p < kPoints; ++p) {
        for (int64_t lane = 0; lane < kLanes; lane += kPiece) {
          const int64_t column = o + lane;
          float* to = points + p * inputs * padded + column / kPanel * kPanel * inputs +
                      i * kPanel + column % kPanel;
          std::memcpy(to, reinterpret_cast<const float*>(&u[p / kTileIn][p % kTileIn]) + lane,
                      4 * kPiece);
        }
      }
    }
  }
}

// How this CPU multiplies: registers hold `rows` x `panel` sums.
struct Isa {
  int64_t rows, panel;
  void (*multiply)(const Product&);
  void (*weights)(const float*, int64_t, int64_t, int64_t, float*);
  void (*inputs)(const float*, const Tiling&, int64_t, int64_t, int64_t, float*, int64_t, int64_t);
  void (*gradients)(const float*, const Tiling&, int64_t, int64_t, int64_t, float*, int64_t,
                    int64_t);
  void (*outputs)(float*, const Tiling&, int64_t, int64_t, int64_t, const float*, int64_t, int64_t,
                  const float*, const float*);
};

#define ATTR_BATCH_ISA(NAME, TARGET, VECTOR, ROWS)                                                 \
  TARGET void multiply_##NAME(const Product& p) { multiply<VECTOR, ROWS>(p); }                     \
  TARGET void weights_##NAME(const float* w, int64_t outputs, int64_t inputs, int64_t padded,      \
                             float* out) {                                                         \
    read_weights<2 * sizeof(VECTOR) / 4>(w, outputs, inputs, padded, out);                         \
  }                                                                                                \
  TARGET void inputs_##NAME(const float* x, const Tiling& g, int64_t n, int64_t t0, int64_t t1,    \
                            float* out, int64_t stride, int64_t plane) {                           \
    read_inputs(x, g, n, t0, t1, out, stride, plane);                                              \
  }                                                                                                \
  TARGET void gradients_##NAME(const float* x, const Tiling& g, int64_t n, int64_t t0, int64_t t1, \
                               float* out, int64_t stride, int64_t plane) {                        \
    read_gradients(x, g, n, t0, t1, out, stride, plane);                                           \
  }                                                                                                \
  TARGET void outputs_##NAME(float* y, const Tiling& g, int64_t n, int64_t t0, int64_t t1,         \
                             const float* in, int64_t stride, int64_t plane, const float* bias,    \
                             const float* residual) {                                              \
    write_outputs(y, g, n, t0, t1, in, stride, plane, bias, residual);                             \
  }                                                                                                \
  constexpr Isa k_##NAME = {                                                                       \
      ROWS,          2 * sizeof(VECTOR) / 4, multiply_##NAME, weights_##NAME,                      \
      inputs_##NAME, gradients_##NAME,       outputs_##NAME};

ATTR_BATCH_ISA(portable, , HalfLanes, 4)
#if defined(__x86_64__)
ATTR_BATCH_ISA(avx2, __attribute__((target("avx2,fma"))), HalfLanes, 6)
ATTR_BATCH_ISA(avx512, __attribute__((target("avx512f,fma"))), Lanes, 14)
#endif

// The widest this CPU has, or what ATTR_BATCH_ISA names: tests go through all of them.
const Isa& choose_isa() {
  const char* named = std::getenv("ATTR_BATCH_ISA");
  const std::string_view wanted = named == nullptr ? "" : named;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && (wanted.empty() || wanted == "avx512")) return k_avx512;
  if (avx2 && (wanted.empty() || wanted == "avx2")) return k_avx2;
#endif
  return k_portable;
}

const Isa& isa() {
  static const Isa& chosen = choose_isa();
  return chosen;
}

// A thread's own memory, kept from call to call: fresh pages cost more than the arithmetic.
enum class Use { kWeights, kInputs, kOutputs, kSums };

float* scratch(Use use, int64_t floats) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  thread_local std::unique_ptr<float, Free> memory[4];
  thread_local int64_t size[4] = {};
  const int u = static_cast<int>(use);
  if (size[u] < floats) {
    memory[u].reset(static_cast<float*>(::operator new(4 * floats, kLine)));
    size[u] = floats;
  }
  return memory[u].get();
}

// Tiles a chunk holds, a multiple of the rows that are multiplied at once.
int64_t chunk_tiles(int64_t floats_per_tile, int64_t rows) {
  return std::max<int64_t>(1, kChunkFloats / (kPoints * floats_per_tile) / rows) * rows;
}

void convolve(const float* x, const float* weight, const float* bias, const float* residual,
              float* y, int64_t images, const Tiling& g, int64_t inputs, int64_t outputs) {
  const Isa& cpu = isa();
  const int64_t in_stride = round_up(inputs, kLanes), out_stride = round_up(outputs, 2 * kLanes);
  float* weights = scratch(Use::kWeights, kPoints * inputs * out_stride);
  cpu.weights(weight, outputs, inputs, out_stride, weights);
  const int64_t tiles = images * g.per_image();
  const int64_t chunk =
      std::min(chunk_tiles(in_stride + out_stride, cpu.rows), round_up(tiles, cpu.rows));
  torch::stable::parallel_for(0, (tiles + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
    float* in = scratch(Use::kInputs, kPoints * chunk * in_stride);
    float* out = scratch(Use::kOutputs, kPoints * chunk * out_stride);
    for (int64_t begin = first * chunk; begin < std::min(last * chunk, tiles); begin += chunk) {
      const int64_t end = std::min(begin + chunk, tiles);
      cpu.inputs(x, g, inputs, begin, end, in, in_stride, chunk * in_stride);
      for (int p = 0; p < kPoints; ++p) {
        cpu.multiply({in + p * chunk * in_stride, in_stride, 1, weights + p * inputs * out_stride,
                      cpu.panel, cpu.panel * inputs, out + p * chunk * out_stride, out_stride,
                      round_up(end - begin, cpu.rows), out_stride, inputs, false});
      }
      cpu.outputs(y, g, outputs, begin, end, out, out_stride, chunk * out_stride, bias, residual);
    }
  });
}

// dweight (O, I, 3, 3) = G^T [ sum over tiles of (B^T d B) . (A dY A^T) ] G.
void weight_gradient(const float* grad, const float* x, float* dweight, int64_t images,
                     const Tiling& g, int64_t inputs, int64_t outputs) {
  const Isa& cpu = isa();
  const int64_t rows = round_up(inputs, cpu.rows);
  const int64_t in_stride = round_up(rows, kLanes), out_stride = round_up(outputs, 2 * kLanes);
  const int64_t tiles = images * g.per_image();
  const int64_t chunk = std::min(4 * chunk_tiles(in_stride + out_stride, 1), tiles);
  float* in = scratch(Use::kInputs, kPoints * chunk * in_stride);
  float* out = scratch(Use::kOutputs, kPoints * chunk * out_stride);
  float* sums = scratch(Use::kSums, kPoints * rows * out_stride);
  for (int64_t begin = 0; begin < tiles; begin += chunk) {
    const int64_t end = std::min(begin + chunk, tiles);
    torch::stable::parallel_for(begin, end, 16, [&](int64_t t0, int64_t t1) {
      const int64_t skip = t0 - begin;
      cpu.inputs(x, g, inputs, t0, t1, in + skip * in_stride, in_stride, chunk * in_stride);
      cpu.gradients(grad, g, outputs, t0, t1, out + skip * out_stride, out_stride,
                    chunk * out_stride);
    });
    torch::stable::parallel_for(0, kPoints, 1, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; ++p) {
        cpu.multiply({in + p * chunk * in_stride, 1, in_stride, out + p * chunk * out_stride,
                      out_stride, cpu.panel, sums + p * rows * out_stride, out_stride, rows,
                      out_stride, end - begin, begin > 0});
      }
    });
  }
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t o = 0; o < outputs; o += kLanes) {
      Lanes m[kTileIn][kTileIn], w[3][3];
      for (int p = 0; p < kPoints; ++p) {
        m[p / kTileIn][p % kTileIn] = load(sums + (p * rows + i) * out_stride + o, kLanes);
      }
      both_ways(m, w, [](const Lanes* d, Lanes* to) { weight_gradients(d, to); });
      for (int64_t lane = 0; lane < std::min(kLanes, outputs - o); ++lane) {
        float* to = dweight + ((o + lane) * inputs + i) * 9;
        for (int tap = 0; tap < 9; ++tap) to[tap] = w[tap / 3][tap % 3][lane];
      }
    }
  }
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual) {
  const Conv3x3Operands o = conv3x3_operands(x, weight, bias, residual);
  Tensor y =
      torch::stable::empty({o.batch, o.outputs, o.height, o.width}, ScalarType::Float, std::nullopt,
                           x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  const int64_t images = o.batch / o.models, pixels = o.height * o.width;
  for (int64_t k = 0; k < o.models && y.numel() > 0; ++k) {
    const int64_t out = k * images * pixels * o.outputs;
    convolve(o.x.const_data_ptr<float>() + k * images * pixels * o.inputs,
             o.weight.const_data_ptr<float>() + k * o.outputs * o.inputs * 9,
             o.bias ? o.bias->const_data_ptr<float>() + k * o.outputs : nullptr,
             o.residual ? o.residual->const_data_ptr<float>() + out : nullptr,
             y.mutable_data_ptr<float>() + out, images, Tiling(o.height, o.width), o.inputs,
             o.outputs);
  }
  return y;
}

Tensor conv3x3_weight_gradient(const Tensor& grad, const Tensor& x, int64_t models) {
  const auto [g, data] = conv3x3_gradients(grad, x, models);
  const int64_t images = x.size(0) / models, inputs = x.size(1), outputs = grad.size(1);
  const Tiling tiling(x.size(2), x.size(3));
  const int64_t pixels = x.size(2) * x.size(3);
  Tensor dweight = torch::stable::empty({models, outputs, inputs, 3, 3}, ScalarType::Float,
                                        std::nullopt, x.device());
  if (images * pixels == 0) return torch::stable::fill_(dweight, 0.0);
  for (int64_t k = 0; k < models && dweight.numel() > 0; ++k) {
    weight_gradient(g.const_data_ptr<float>() + k * images * pixels * outputs,
                    data.const_data_ptr<float>() + k * images * pixels * inputs,
                    dweight.mutable_data_ptr<float>() + k * outputs * inputs * 9, images, tiling,
                    inputs, outputs);
  }
  return dweight;
}

}  // namespace
}  // namespace attr_batch::cpu

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&attr_batch::cpu::conv3x3));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&attr_batch::cpu::conv3x3_weight_gradient));
}
