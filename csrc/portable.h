// One source for host and device, and for every CPU the binary may meet.
//
// The mathematics of an op stands in headers that both back ends include, marked ATTR_BATCH_HD.
// Only +, -, *, /, sqrt and integer operations are used, each correctly rounded by IEEE 754, and
// nothing is contracted (-ffp-contract=off, -fmad=false). So vector width, instruction set and back
// end cannot change a bit; ATTR_BATCH_CLONES may then pick the widest vectors at load time.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define ATTR_BATCH_HD __host__ __device__ __forceinline__
#else
#define ATTR_BATCH_HD inline __attribute__((always_inline))
#endif

// On a lambda: only inlined code takes part in its caller's choice of vectors (ATTR_BATCH_CLONES).
#define ATTR_BATCH_INLINE __attribute__((always_inline))

#if defined(__CUDACC__) || defined(__clang__)
#define ATTR_BATCH_UNROLL _Pragma("unroll")
#else
#define ATTR_BATCH_UNROLL _Pragma("GCC unroll 16")
#endif

// The dynamic loader resolves a cloned function once, through an ifunc: ELF with glibc only.
// x86-64-v4 is AVX-512 with 16-bit lanes, which bfloat16 wants; older compilers do not know it.
#if defined(__CUDACC__) || !defined(__x86_64__) || !defined(__gnu_linux__)
#define ATTR_BATCH_CLONES
#elif defined(__clang__) || __GNUC__ >= 12
#define ATTR_BATCH_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define ATTR_BATCH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace attr_batch {

// Choose without a branch, so that loops over lanes vectorise.
ATTR_BATCH_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }

ATTR_BATCH_HD float from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

ATTR_BATCH_HD uint32_t to_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

}  // namespace attr_batch
