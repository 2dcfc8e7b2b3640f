// norm_act on the CPU: a sample at a time, three passes over data that stay in the second-level
// cache (mean, centred squares, output); the derivative takes two.
//
// A pass goes tile by tile. A tile is a few whole pixels, so that narrow and odd widths fill
// vectors too; a coefficient of a channel is repeated for every pixel of a tile, and element i of
// any tile, lane i, is of one channel. Sums run per lane, then over the pixels of a tile, then over
// the channels of a group: an order that neither batch, threads nor vectors change.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "../norm.h"
#include "../silu.h"
#include "bfloat16.h"

namespace attr_batch::cpu {
namespace {

constexpr int64_t kTile = 256;    // elements of a tile at most, unless a pixel has more
constexpr int64_t kVector = 16;   // the elements of the widest vector
constexpr int64_t kPartial = 32;  // tiles summed in T before float64 takes over

// How many pixels leave the fewest elements of a tile outside whole vectors.
int64_t tile_pixels(int64_t channels) {
  const int64_t most = std::max<int64_t>(1, kTile / std::max<int64_t>(channels, 1));
  int64_t best = most;
  for (int64_t r = most; 2 * r > most; --r) {
    if (r * channels % kVector < best * channels % kVector) best = r;
  }
  return best;
}

template <typename S>  // as stored; a bfloat16 is its bits
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

struct Shape {
  int64_t own, channels, pixels, groups;
  int64_t repeats, lanes;  // pixels and elements of a tile

  explicit Shape(const NormOperands& o)
      : own(o.own),
        channels(o.channels),
        pixels(o.pixels),
        groups(o.groups),
        repeats(tile_pixels(o.channels)),
        lanes(repeats * o.channels) {}
};

// An array of zeros, aligned to the cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_(size * sizeof(T) / sizeof(Line) + 1) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines_;
};

// Sums by lane; `by_channel` leaves those of the channels in the first lanes of `total`.
template <typename T>
class Sums {
 public:
  explicit Sums(const Shape& s) : part_(s.lanes), total_(s.lanes) {}

  T* part() { return part_.data(); }
  const double* total() { return total_.data(); }

  ATTR_BATCH_HD void clear(const Shape& s) { std::fill_n(total_.data(), s.lanes, 0.0); }

  ATTR_BATCH_HD void flush(const Shape& s) {
    T* __restrict__ part = part_.data();
    double* __restrict__ total = total_.data();
    for (int64_t i = 0; i < s.lanes; ++i) {
      total[i] += static_cast<double>(part[i]);
      part[i] = 0;
    }
  }

  ATTR_BATCH_HD void by_channel(const Shape& s) {
    flush(s);
    double* __restrict__ first = total_.data();
    for (int64_t r = 1; r < s.repeats; ++r) {
      const double* __restrict__ row = total_.data() + r * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) first[c] += row[c];
    }
  }

 private:
  Buffer<T> part_;
  Buffer<double> total_;
};

// What a thread needs: tiles, coefficients by lane, sums, and the derivative in all of a sample.
template <typename T>
struct Workspace {
  Buffer<T> tile, result, centre, rstd, gain, offset, slope, constant, derivative;
  Sums<T> first, second, third;

  Workspace(const Shape& s, int64_t kept)
      : tile(s.lanes),
        result(s.lanes),
        centre(s.lanes),
        rstd(s.lanes),
        gain(s.lanes),
        offset(s.lanes),
        slope(s.lanes),
        constant(s.lanes),
        derivative(kept),
        first(s),
        second(s),
        third(s) {}
};

// One sample's inputs; `skip`, `add`, `scale` and `shift` may be null.
template <typename S>
struct Sample {
  using T = Arithmetic<S>;
  const S *x, *skip;
  const T *weight, *bias, *add, *scale, *shift;

  ATTR_BATCH_HD T added(int64_t c) const { return add == nullptr ? T(0) : add[c]; }

  ATTR_BATCH_HD Affine<T> coefficients(int64_t c) const {
    return affine(weight[c], bias[c], scale == nullptr ? T(0) : scale[c],
                  shift == nullptr ? T(0) : shift[c]);
  }
};

template <typename S, typename T>
ATTR_BATCH_HD void widen_row(const S* __restrict__ from, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <typename S, typename T>
ATTR_BATCH_HD void narrow_row(const T* __restrict__ from, S* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

template <typename H, typename T>
ATTR_BATCH_HD void add_row(const H* __restrict__ h, T* __restrict__ sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += widen(h[i]);
}

template <typename H, typename T>
ATTR_BATCH_HD void add_squares(const H* __restrict__ h, const T* __restrict__ centre,
                               T* __restrict__ sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T centred = widen(h[i]) - centre[i];
    sum[i] += centred * centred;
  }
}

// Loops of one width each: GCC makes less of those that mix bfloat16 with much arithmetic.
template <typename H, typename T, typename S>
ATTR_BATCH_HD void act_row(const H* __restrict__ h, const T* __restrict__ centre,
                           const T* __restrict__ gain, const T* __restrict__ offset, bool activate,
                           T* __restrict__ z, S* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = (widen(h[i]) - centre[i]) * gain[i] + offset[i];
  if (activate) {
    for (int64_t i = 0; i < n; ++i) z[i] = silu(z[i]);
  }
  narrow_row(z, y, n);
}

// d from the derivative in y; n, normalised, is of use to the caller.
template <typename H, typename T, typename S>
ATTR_BATCH_HD void differentiate_row(const H* __restrict__ h, const T* __restrict__ centre,
                                     const T* __restrict__ rstd, const T* __restrict__ gain,
                                     const T* __restrict__ offset, const S* __restrict__ of_y,
                                     bool activate, T* __restrict__ normal, T* __restrict__ d,
                                     int64_t n) {
  for (int64_t i = 0; i < n; ++i) normal[i] = (widen(h[i]) - centre[i]) * rstd[i];
  widen_row(of_y, d, n);
  if (activate) {
    for (int64_t i = 0; i < n; ++i) d[i] *= silu_derivative(normal[i] * gain[i] + offset[i]);
  }
}

template <typename T>
ATTR_BATCH_HD void add_derivatives(const T* __restrict__ d, const T* __restrict__ normal,
                                   T* __restrict__ of_d, T* __restrict__ of_d_n,
                                   T* __restrict__ of_n, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    of_d[i] += d[i];
    of_d_n[i] += d[i] * normal[i];
    of_n[i] += normal[i];
  }
}

template <typename H, typename T>
ATTR_BATCH_HD void differentiate_norm_row(const H* __restrict__ h, const T* __restrict__ centre,
                                          const T* __restrict__ gain, const T* __restrict__ slope,
                                          const T* __restrict__ constant, const T* __restrict__ d,
                                          T* __restrict__ dh, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    dh[i] = (gain[i] * d[i] - slope[i] * (widen(h[i]) - centre[i])) - constant[i];
  }
}

// Calls f(h) for elements start .. start + n - 1, whole pixels, of x and skip concatenated: where
// they lie, or in `tile`.
template <typename S, typename T, typename F>
ATTR_BATCH_HD void with_tile(const Shape& s, const Sample<S>& a, int64_t start, int64_t n, T* tile,
                             F f) {
  if (a.skip == nullptr) return f(a.x + start);
  const int64_t others = s.channels - s.own;
  for (int64_t p = start / s.channels, i = 0; i < n; ++p, i += s.channels) {
    widen_row(a.x + p * s.own, tile + i, s.own);
    widen_row(a.skip + p * others, tile + i + s.own, others);
  }
  f(static_cast<const T*>(tile));
}

template <typename S, typename T>
ATTR_BATCH_HD void store(const Shape& s, const T* tile, int64_t start, int64_t n, S* x, S* skip) {
  if (skip == nullptr) return narrow_row(tile, x + start, n);
  const int64_t others = s.channels - s.own;
  for (int64_t pixel = start / s.channels; n > 0; ++pixel, n -= s.channels, tile += s.channels) {
    narrow_row(tile, x + pixel * s.own, s.own);
    narrow_row(tile + s.own, skip + pixel * others, others);
  }
}

// Calls f(start, n) for the elements of every tile; `sums` are those f adds to.
template <typename F, typename... S>
ATTR_BATCH_HD void for_tiles(const Shape& s, F f, S&... sums) {
  const int64_t elements = s.pixels * s.channels;
  (sums.clear(s), ...);
  int64_t tiles = 0;
  for (int64_t start = 0; start < elements; start += s.lanes) {
    f(start, std::min(s.lanes, elements - start));
    if (++tiles % kPartial == 0) (sums.flush(s), ...);
  }
  (sums.by_channel(s), ...);
}

// Calls f(group, its first channel, its last channel + 1).
template <typename F>
ATTR_BATCH_HD void for_groups(const Shape& s, F f) {
  const int64_t width = s.channels / s.groups;
  for (int64_t g = 0; g < s.groups; ++g) f(g, g * width, (g + 1) * width);
}

ATTR_BATCH_HD double group_size(const Shape& s) {
  return static_cast<double>(s.channels / s.groups * s.pixels);
}

// From the first pixel of a tile to the others.
template <typename T>
ATTR_BATCH_HD void repeat(const Shape& s, T* lanes) {
  for (int64_t r = 1; r < s.repeats; ++r) std::copy_n(lanes, s.channels, lanes + r * s.channels);
}

// What to subtract from x for n: the mean, less what is added to x.
template <typename S, typename T>
ATTR_BATCH_HD void set_centre(const Shape& s, const Sample<S>& a, const T* stats, T* centre) {
  for_groups(s, [&](int64_t g, int64_t begin, int64_t end) ATTR_BATCH_INLINE {
    for (int64_t c = begin; c < end; ++c) centre[c] = stats[2 * g] - a.added(c);
  });
  repeat(s, centre);
}

// Sets `stats`, (mean, 1 / standard deviation) of each group, and w.centre.
template <typename S, typename T>
ATTR_BATCH_HD void measure(const Shape& s, const Sample<S>& a, T eps, Workspace<T>& w, T* stats) {
  const double* sums = w.first.total();
  for_tiles(
      s,
      [&](int64_t start, int64_t n) ATTR_BATCH_INLINE {
        with_tile(s, a, start, n, w.tile.data(),
                  [&](const auto* h) ATTR_BATCH_INLINE { add_row(h, w.first.part(), n); });
      },
      w.first);
  for_groups(s, [&](int64_t g, int64_t begin, int64_t end) ATTR_BATCH_INLINE {
    double of_x = 0, of_add = 0;
    for (int64_t c = begin; c < end; ++c) {
      of_x += sums[c];
      of_add += static_cast<double>(a.added(c));
    }
    const double pixels = static_cast<double>(s.pixels);
    stats[2 * g] = static_cast<T>((of_x + pixels * of_add) / group_size(s));
  });
  set_centre(s, a, stats, w.centre.data());
  for_tiles(
      s,
      [&](int64_t start, int64_t n) ATTR_BATCH_INLINE {
        with_tile(s, a, start, n, w.tile.data(), [&](const auto* h) ATTR_BATCH_INLINE {
          add_squares(h, w.centre.data(), w.first.part(), n);
        });
      },
      w.first);
  for_groups(s, [&](int64_t g, int64_t begin, int64_t end) ATTR_BATCH_INLINE {
    double squares = 0;
    for (int64_t c = begin; c < end; ++c) squares += sums[c];
    stats[2 * g + 1] = inverse_root(static_cast<T>(squares / group_size(s)) + eps);
  });
}

template <typename S, typename T>
ATTR_BATCH_HD void act(const Shape& s, const Sample<S>& a, T eps, bool activate, Workspace<T>& w,
                       S* y, T* stats) {
  T *gain = w.gain.data(), *offset = w.offset.data();
  measure(s, a, eps, w, stats);
  for_groups(s, [&](int64_t g, int64_t begin, int64_t end) ATTR_BATCH_INLINE {
    for (int64_t c = begin; c < end; ++c) {
      const Affine<T> k = a.coefficients(c);
      gain[c] = stats[2 * g + 1] * k.gain;
      offset[c] = k.offset;
    }
  });
  repeat(s, gain);
  repeat(s, offset);
  for_tiles(s, [&](int64_t start, int64_t n) ATTR_BATCH_INLINE {
    with_tile(s, a, start, n, w.tile.data(), [&](const auto* h) ATTR_BATCH_INLINE {
      act_row(h, w.centre.data(), gain, offset, activate, w.result.data(), y + start, n);
    });
  });
}

// Keeps d, the derivative in the argument of act, and sums d, d n and n.
template <typename S, typename T>
ATTR_BATCH_HD void differentiate_act(const Shape& s, const Sample<S>& a, const S* grad,
                                     const T* stats, bool activate, Workspace<T>& w) {
  T *rstd = w.rstd.data(), *gain = w.gain.data(), *offset = w.offset.data();
  set_centre(s, a, stats, w.centre.data());
  for_groups(s, [&](int64_t g, int64_t begin, int64_t end) ATTR_BATCH_INLINE {
    for (int64_t c = begin; c < end; ++c) {
      const Affine<T> k = a.coefficients(c);
      rstd[c] = stats[2 * g + 1];
      gain[c] = k.gain;
      offset[c] = k.offset;
    }
  });
  for (T* lanes : {rstd, gain, offset}) repeat(s, lanes);
  for_tiles(
      s,
      [&](int64_t start, int64_t n) ATTR_BATCH_INLINE {
        T* d = w.derivative.data() + start;
        with_tile(s, a, start, n, w.tile.data(), [&](const auto* h) ATTR_BATCH_INLINE {
          differentiate_row(h, w.centre.data(), rstd, gain, offset, grad + start, activate,
                            w.result.data(), d, n);
        });
        add_derivatives(d, w.result.data(), w.first.part(), w.second.part(), w.third.part(), n);
      },
      w.first, w.second, w.third);
}

// Sets `sums`, by channel those of d, d n and dL/dh, and the coefficients of
// dL/dh = gain d - slope (x - centre) - constant.
template <typename T>
ATTR_BATCH_HD void combine(const Shape& s, const T* stats, Workspace<T>& w, T* sums) {
  const double *of_d = w.first.total(), *of_d_n = w.second.total(), *of_n = w.third.total();
  T *gain = w.gain.data(), *slope = w.slope.data(), *constant = w.constant.data();
  for_groups(s, [&](int64_t g, int64_t begin, int64_t end) ATTR_BATCH_INLINE {
    const double rstd = static_cast<double>(stats[2 * g + 1]);
    double mean = 0, mean_n = 0;  // of gain d and gain d n
    for (int64_t c = begin; c < end; ++c) {
      mean += static_cast<double>(gain[c]) * of_d[c];
      mean_n += static_cast<double>(gain[c]) * of_d_n[c];
    }
    mean /= group_size(s);
    mean_n /= group_size(s);
    for (int64_t c = begin; c < end; ++c) {
      const double of_g = static_cast<double>(gain[c]) * of_d[c];
      const double of_h = of_g - static_cast<double>(s.pixels) * mean - mean_n * of_n[c];
      sums[c] = static_cast<T>(of_d[c]);
      sums[s.channels + c] = static_cast<T>(of_d_n[c]);
      sums[2 * s.channels + c] = static_cast<T>(rstd * of_h);
      gain[c] *= stats[2 * g + 1];
      slope[c] = static_cast<T>(rstd * rstd * mean_n);
      constant[c] = static_cast<T>(rstd * mean);
    }
  });
  for (T* lanes : {gain, slope, constant}) repeat(s, lanes);
}

template <typename S, typename T>
ATTR_BATCH_HD void differentiate(const Shape& s, const Sample<S>& a, const S* grad, const T* stats,
                                 bool activate, Workspace<T>& w, S* dx, S* dskip, T* sums) {
  differentiate_act(s, a, grad, stats, activate, w);
  combine(s, stats, w, sums);
  for_tiles(s, [&](int64_t start, int64_t n) ATTR_BATCH_INLINE {
    with_tile(s, a, start, n, w.tile.data(), [&](const auto* h) ATTR_BATCH_INLINE {
      differentiate_norm_row(h, w.centre.data(), w.gain.data(), w.slope.data(), w.constant.data(),
                             w.derivative.data() + start, w.result.data(), n);
    });
    store(s, w.result.data(), start, n, dx, dskip);
  });
}

ATTR_BATCH_CLONES
void act_sample(const Shape& s, const Sample<float>& a, float eps, bool activate,
                Workspace<float>& w, float* y, float* stats) {
  act(s, a, eps, activate, w, y, stats);
}

ATTR_BATCH_CLONES
void differentiate_sample(const Shape& s, const Sample<float>& a, const float* grad,
                          const float* stats, bool activate, Workspace<float>& w, float* dx,
                          float* dskip, float* sums) {
  differentiate(s, a, grad, stats, activate, w, dx, dskip, sums);
}

ATTR_BATCH_CLONES
void act_sample(const Shape& s, const Sample<uint16_t>& a, float eps, bool activate,
                Workspace<float>& w, uint16_t* y, float* stats) {
  act(s, a, eps, activate, w, y, stats);
}

ATTR_BATCH_CLONES
void differentiate_sample(const Shape& s, const Sample<uint16_t>& a, const uint16_t* grad,
                          const float* stats, bool activate, Workspace<float>& w, uint16_t* dx,
                          uint16_t* dskip, float* sums) {
  differentiate(s, a, grad, stats, activate, w, dx, dskip, sums);
}

void act_sample(const Shape& s, const Sample<double>& a, double eps, bool activate,
                Workspace<double>& w, double* y, double* stats) {
  act(s, a, eps, activate, w, y, stats);
}

void differentiate_sample(const Shape& s, const Sample<double>& a, const double* grad,
                          const double* stats, bool activate, Workspace<double>& w, double* dx,
                          double* dskip, double* sums) {
  differentiate(s, a, grad, stats, activate, w, dx, dskip, sums);
}

template <typename T>
const T* data(const Tensor& t, int64_t start) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) + start : nullptr;
}

template <typename T>
T* mutable_data(Tensor& t, int64_t start) {
  return static_cast<T*>(t.mutable_data_ptr()) + start;
}

template <typename S>
Sample<S> sample(const NormOperands& o, int64_t b) {
  using T = Arithmetic<S>;
  const int64_t own = b * o.own * o.pixels, others = b * (o.channels - o.own) * o.pixels;
  const int64_t model = b / (o.batch / o.models) * o.channels, row = b * o.channels;
  return {data<S>(o.x, own),      data<S>(o.skip, others), data<T>(o.weight, model),
          data<T>(o.bias, model), data<T>(o.add, row),     data<T>(o.scale, row),
          data<T>(o.shift, row)};
}

// Calls f(sample, workspace) for every sample; the workspace holds `kept` elements of derivatives.
template <typename T, typename F>
void for_samples(const NormOperands& o, const Shape& s, int64_t kept, F f) {
  const int64_t grain = 1 + 16384 / std::max<int64_t>(s.channels * s.pixels, 1);
  torch::stable::parallel_for(0, o.batch, grain, [&](int64_t begin, int64_t end) {
    Workspace<T> w(s, kept);
    for (int64_t b = begin; b < end; ++b) f(b, w);
  });
}

template <typename S>
void act_all(const NormOperands& o, double eps, bool activate, Tensor& y, Tensor& stats) {
  using T = Arithmetic<S>;
  const Shape s(o);
  for_samples<T>(o, s, 0, [&](int64_t b, Workspace<T>& w) {
    act_sample(s, sample<S>(o, b), static_cast<T>(eps), activate, w,
               mutable_data<S>(y, b * s.channels * s.pixels),
               mutable_data<T>(stats, b * s.groups * 2));
  });
}

template <typename S>
void differentiate_all(const NormOperands& o, const Tensor& grad, const Tensor& stats,
                       bool activate, Tensor& dx, Tensor& dskip, Tensor& sums) {
  using T = Arithmetic<S>;
  const Shape s(o);
  const int64_t elements = s.channels * s.pixels, others = (s.channels - s.own) * s.pixels;
  for_samples<T>(o, s, elements, [&](int64_t b, Workspace<T>& w) {
    differentiate_sample(s, sample<S>(o, b), data<S>(grad, b * elements),
                         data<T>(stats, b * s.groups * 2), activate, w,
                         mutable_data<S>(dx, b * s.own * s.pixels),
                         o.skip.defined() ? mutable_data<S>(dskip, b * others) : nullptr,
                         mutable_data<T>(sums, b * 3 * s.channels));
  });
}

std::tuple<Tensor, Tensor> norm_act(const Tensor& x, const std::optional<Tensor>& skip,
                                    const Tensor& weight, const Tensor& bias,
                                    const std::optional<Tensor>& add,
                                    const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& shift, int64_t groups, double eps,
                                    bool silu) {
  const NormOperands o = norm_operands(x, skip, weight, bias, add, scale, shift, groups);
  Tensor y = empty_channels_last(o.x, o.channels);
  Tensor stats = torch::stable::new_empty(o.x, {o.batch, groups, 2}, o.arithmetic);
  const auto run = x.scalar_type() == ScalarType::Float      ? act_all<float>
                   : x.scalar_type() == ScalarType::BFloat16 ? act_all<uint16_t>
                                                             : act_all<double>;
  run(o, eps, silu, y, stats);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& add, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const Tensor& stats, int64_t groups, bool silu) {
  const NormOperands o = norm_operands(x, skip, weight, bias, add, scale, shift, groups);
  const Tensor of_y = norm_gradient(o, grad, stats);
  Tensor dx = empty_channels_last(o.x, o.own);
  Tensor dskip =
      skip ? empty_channels_last(o.x, o.channels - o.own) : torch::stable::new_empty(o.x, {0});
  Tensor sums = torch::stable::new_empty(o.x, {o.batch, 3, o.channels}, o.arithmetic);
  if (o.pixels == 0) return {dx, dskip, torch::stable::zero_(sums)};
  const auto run = x.scalar_type() == ScalarType::Float      ? differentiate_all<float>
                   : x.scalar_type() == ScalarType::BFloat16 ? differentiate_all<uint16_t>
                                                             : differentiate_all<double>;
  run(o, of_y, torch::stable::contiguous(stats), silu, dx, dskip, sums);
  return {dx, dskip, sums};
}

}  // namespace
}  // namespace attr_batch::cpu

STABLE_TORCH_LIBRARY_IMPL(attr_batch, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&attr_batch::cpu::norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&attr_batch::cpu::norm_act_backward));
}
