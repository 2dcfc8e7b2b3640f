// What the kernels share, without torch: so tests/cuda_on_cpu can compile their headers with a C++
// compiler and run them on a CPU. It defines the few names of CUDA they use before it includes
// them.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../portable.h"

namespace attr_batch::cuda {

#ifdef __CUDACC__
// All shared memory is asked for at launch, so that one line here can stand for it.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  constexpr size_t kUnasked = 48 * 1024;  // more of it must be asked for; no work on the stream
  if (shared_bytes > kUnasked) {
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
}

// Four blocks of 8 x 8 from shared memory: lane l names row l % 8 (16 bytes) of block l / 8, and is
// given, of every block, row l / 4 at columns 2 (l % 4) and the next; of the block's transpose
// where kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_blocks(uint32_t (&to)[4], const __nv_bfloat16* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  }
}

// sum (16 x 8) += left (16 x 16) right (16 x 8) on tensor cores. In blocks of 8 x 8 as above: left
// is (upper, lower) of the first 8 columns, then of the others; right the transposes of upper and
// lower; sum two rows, 8 apart, at two neighbouring columns.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&left)[4],
                                             uint32_t right_upper, uint32_t right_lower) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_upper), "r"(right_lower));
}
#endif

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load and store
constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 16384;  // several waves on any GPU

ATTR_BATCH_HD int64_t blocks_of(int64_t size, int64_t n) { return (n + size - 1) / size; }
ATTR_BATCH_HD int64_t round_up(int64_t size, int64_t n) { return blocks_of(size, n) * size; }

// Of elementwise kernels, whose threads stride over the grid.
inline unsigned grid_size(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(blocks_of(kThreads, threads), 1, kMaxGrid));
}

__device__ __forceinline__ int64_t first_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t thread_count() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16(value);
}

// V neighbours, moved at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// Two channels_last tensors read or written as if concatenated: (pixels, first + second).
template <typename T>
struct Pair {
  T* first;
  T* second;
  int first_width, second_width;

  __device__ __forceinline__ T* at(int64_t pixel, int channel) const {
    return channel < first_width ? first + pixel * first_width + channel
                                 : second + pixel * second_width + (channel - first_width);
  }
};

// Calls f with the width of the vectors that channels are moved in, as a constant: 16 bytes if all
// these channel counts are multiples of that, so that none lies in two tensors or pixels, else one.
template <typename T, typename F>
void with_vectors(std::initializer_list<int> widths, F f) {
  constexpr int V = kVectorBytes / sizeof(T);
  if (std::all_of(widths.begin(), widths.end(), [](int width) { return width % V == 0; })) {
    f(std::integral_constant<int, V>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

}  // namespace attr_batch::cuda
