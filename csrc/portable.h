// One source for host and device, and for every CPU the binary may meet.
//
// The mathematics of an op stands in headers that both back ends include, marked ATTR_BATCH_HD.
// Only
// +, -, *, /, sqrt and integer operations are used, each correctly rounded by IEEE 754, and nothing
// is contracted (-ffp-contract=off, -fmad=false). So vector width, instruction set and back end
// cannot change a bit; ATTR_BATCH_CLONES may then pick the widest vectors at load time.
#pragma once

#ifdef __CUDACC__
#define ATTR_BATCH_HD __host__ __device__ __forceinline__
#else
#define ATTR_BATCH_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__clang__)
#define ATTR_BATCH_UNROLL _Pragma("unroll")
#else
#define ATTR_BATCH_UNROLL _Pragma("GCC unroll 16")
#endif

// The dynamic loader resolves a cloned function once, through an ifunc: ELF with glibc only.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__CUDACC__)
#define ATTR_BATCH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ATTR_BATCH_CLONES
#endif
