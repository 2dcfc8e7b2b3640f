// attr_batch._native_info: how the libraries were built and what this CPU can do, for `attr-batch
// doctor` and provenance; and the shared mathematics, word by word, for known-answer tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "normal.h"
#include "silu.h"

namespace py = pybind11;

namespace {

#define ATTR_BATCH_STRING_(x) #x
#define ATTR_BATCH_STRING(x) ATTR_BATCH_STRING_(x)

py::dict build() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = ATTR_BATCH_FLAGS;
  info["torch_target_version"] = ATTR_BATCH_STRING(TORCH_TARGET_VERSION);
  info["source_digest"] = ATTR_BATCH_SOURCE_DIGEST;
  info["cuda_arch"] = ATTR_BATCH_CUDA_ARCH;
  return info;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define ATTR_BATCH_PROBE(name) \
  if (__builtin_cpu_supports(name)) features.emplace_back(name)
  ATTR_BATCH_PROBE("sse4.2");
  ATTR_BATCH_PROBE("avx");
  ATTR_BATCH_PROBE("avx2");
  ATTR_BATCH_PROBE("fma");
  ATTR_BATCH_PROBE("avx512f");
#endif
  return features;
}

py::tuple philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const attr_batch::Words w =
      attr_batch::philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
}

py::tuple normal_pair(uint32_t x, uint32_t y) {
  const attr_batch::NormalPair z = attr_batch::box_muller(x, y);
  return py::make_tuple(z.z0, z.z1);
}

}  // namespace

PYBIND11_MODULE(_native_info, m) {
  m.doc() = "Build information and the ops' shared mathematics";
  m.def("build", &build, "Compiler, flags, torch target version, digest of csrc, CUDA targets");
  m.def("cpu_features", &cpu_features, "Vector extensions of this CPU");
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"), "One Philox block");
  m.def("box_muller", &normal_pair, py::arg("x"), py::arg("y"), "Two normals from two words");
  m.def("sigmoid", &attr_batch::sigmoid<float>, py::arg("z"), "The logistic function");
  m.def("silu", &attr_batch::silu<float>, py::arg("z"), "z sigmoid(z)");
  m.def("silu_derivative", &attr_batch::silu_derivative<float>, py::arg("z"), "Its derivative");
}
