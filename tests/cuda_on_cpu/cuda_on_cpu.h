// Enough of CUDA for our kernels to be compiled by a C++ compiler and run on a CPU: an emulation
// that shows their logic. It knows nothing of the hardware's memory model, of speed, or of the
// order in which tensor cores add.
//
// A block's threads are fibers, run one at a time until they wait at a barrier or end; blocks run
// one after the other. So whatever a barrier does not order, `order` does: a result that depends on
// it is a race. Threads that wait at different barriers, or wait for one that has ended, are an
// error. Shared memory has exactly the size asked for and starts as NaN in every block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx(0), blockIdx(0), blockDim(1), gridDim(1);

namespace cuda_on_cpu {

constexpr int kLanes = 32;

struct Site {  // of a barrier in the source
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line);
  }
};

enum class State { kReady, kAtWarp, kAtBlock, kEnded };
enum class Order { kForward, kBackward, kShuffled };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  Site site;
  int exchanges;
};

constexpr size_t kStack = 256 * 1024, kPayload = 32;

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kCanary = 0;  // its own red zones see reads as well
#else
constexpr size_t kCanary = 4096;
#endif

// The one block that runs.
struct Block {
  std::vector<Fiber> fibers;
  size_t threads = 0, current = 0;
  ucontext_t scheduler;
  unsigned char* shared = nullptr;
  std::vector<std::array<unsigned char, kPayload>> slots[2];  // by thread: what lanes show others
  Order order = Order::kForward;
  std::mt19937 random{0};
  std::string error;  // of the last launch
};

inline Block block;

inline Fiber& current() { return block.fibers[block.current]; }

inline void to_scheduler() { swapcontext(&current().context, &block.scheduler); }

// Ends the launch; its fibers are never resumed.
inline void fail(const std::string& what) {
  block.error = what + " in thread " + std::to_string(block.current);
  to_scheduler();
}

inline void wait(State state, Site site) {
  current().state = state;
  current().site = site;
  to_scheduler();
}

// All lanes show theirs; returns the first lane's, each kPayload bytes apart. Two slots take turns:
// nobody writes to one before all have left it, because the other's barrier lies between.
template <typename P>
const std::array<unsigned char, kPayload>* exchange(const P& mine, Site site) {
  static_assert(std::is_trivially_copyable_v<P> && sizeof(P) <= kPayload);
  auto& slot = block.slots[current().exchanges++ % 2];
  std::memcpy(slot[block.current].data(), &mine, sizeof(P));
  wait(State::kAtWarp, site);
  return &slot[block.current / kLanes * kLanes];
}

template <typename P>
P shown(const std::array<unsigned char, kPayload>& slot) {
  P value;
  std::memcpy(&value, slot.data(), sizeof(P));
  return value;
}

inline bool same_site(size_t begin, size_t end, State state) {
  for (size_t t = begin; t < end; ++t) {
    const Fiber& fiber = block.fibers[t];
    if (fiber.state != state || !(fiber.site == block.fibers[begin].site)) return false;
  }
  return true;
}

inline bool release(size_t begin, size_t end, State state) {
  if (!same_site(begin, end, state)) return false;
  for (size_t t = begin; t < end; ++t) block.fibers[t].state = State::kReady;
  return true;
}

inline std::string stuck() {
  std::string text = "threads wait for each other:";
  for (size_t t = 0; t < block.threads; ++t) {
    const Fiber& fiber = block.fibers[t];
    const auto same_as_before = [&](const Fiber& before) {
      return fiber.state == before.state &&
             (fiber.state == State::kEnded || fiber.site == before.site);
    };
    if (t > 0 && same_as_before(block.fibers[t - 1])) continue;
    text += " " + std::to_string(t) + " ";
    text += fiber.state == State::kEnded ? "has ended;" : "is at " + fiber.site.text() + ";";
  }
  return text;
}

// Runs the block's fibers to their end, or sets `error`.
inline void run_fibers() {
  std::vector<size_t> order(block.threads);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (block.order == Order::kBackward) std::reverse(order.begin(), order.end());
  while (block.error.empty()) {
    if (block.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), block.random);
    for (const size_t t : order) {
      if (block.fibers[t].state != State::kReady) continue;
      block.current = t;
      threadIdx.x = static_cast<unsigned>(t);
      swapcontext(&block.scheduler, &block.fibers[t].context);
      if (!block.error.empty()) return;
    }
    bool released = release(0, block.threads, State::kAtBlock);
    for (size_t t = 0; t + kLanes <= block.threads; t += kLanes) {
      released |= release(t, t + kLanes, State::kAtWarp);
    }
    if (released) continue;
    if (!same_site(0, block.threads, State::kEnded)) block.error = stuck();
    return;
  }
}

template <typename Body>
void start() {
  (*static_cast<const Body*>(Body::now))();
  current().state = State::kEnded;
  to_scheduler();
}

template <typename Body>
void run_block(size_t threads, const Body& body) {
  block.threads = threads;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (auto& slot : block.slots) slot.resize(threads);
  Body::now = &body;
  for (size_t t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.state = State::kReady;
    fiber.site = {"", 0};
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start<Body>, 0);
  }
  run_fibers();
}

template <typename F>
struct Body {
  F call;
  inline static const void* now = nullptr;
  void operator()() const { call(); }
};

template <typename F>
void run_grid(dim3 grid, int threads, size_t shared_bytes, F call) {
  block.error.clear();
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      threads < 1 || threads > 1024 || shared_bytes > 99 * 1024) {
    block.error = "no GPU accepts this launch";
    return;
  }
  const Body<F> body{call};
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, max(shared_bytes + kCanary, size_t{1})) != 0) std::abort();
  block.shared = static_cast<unsigned char*>(shared);
  const auto *end = block.shared + shared_bytes, *canary_end = end + kCanary;
  for (unsigned z = 0; z < grid.z && block.error.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && block.error.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && block.error.empty(); ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(shared, 0xFF, shared_bytes + kCanary);
        run_block(static_cast<size_t>(threads), body);
        if (std::any_of(end, canary_end, [](unsigned char byte) { return byte != 0xFF; })) {
          block.error += "written past the end of shared memory";
        }
        const std::string at = std::to_string(x) + ", " + std::to_string(y);
        if (!block.error.empty()) block.error += ", block (" + at + ", " + std::to_string(z) + ")";
      }
    }
  }
  std::free(shared);
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::wait(cuda_on_cpu::State::kAtBlock, {file, line});
}

inline float __shfl_xor_sync(unsigned mask, float value, int apart,
                             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (mask != 0xFFFFFFFFu) cuda_on_cpu::fail("only whole warps are emulated");
  const auto* lanes = cuda_on_cpu::exchange(value, {file, line});
  return cuda_on_cpu::shown<float>(lanes[(threadIdx.x % cuda_on_cpu::kLanes) ^ apart]);
}

// bfloat16 -----------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// The kernels' own few names that need a GPU (device.cuh) --------------------------------------

namespace attr_batch::cuda {

inline unsigned char* shared_memory() { return cuda_on_cpu::block.shared; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t, Arguments... arguments) {
  if (!cuda_on_cpu::block.error.empty()) return;  // keeps the first error until it is asked for
  cuda_on_cpu::run_grid(grid, threads, shared_bytes, [=] { kernel(arguments...); });
}

// Two neighbours in a register, the first in the lower half.
inline uint32_t both(__nv_bfloat16 first, __nv_bfloat16 second) {
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}
inline float half(uint32_t both, int which) {
  return __bfloat162float({static_cast<uint16_t>(both >> 16 * which)});
}

// ldmatrix .x4, as PTX defines it.
template <bool kTransposed>
void load_blocks(uint32_t (&to)[4], const __nv_bfloat16* row, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_on_cpu::fail("a misaligned row");
  const auto* lanes = cuda_on_cpu::exchange(row, {file, line});
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::kLanes;
  for (int block = 0; block < 4; ++block) {
    const auto element = [&](int r, int c) {
      return cuda_on_cpu::shown<const __nv_bfloat16*>(lanes[8 * block + r])[c];
    };
    const int r = lane / 4, c = lane % 4 * 2;
    to[block] = kTransposed ? both(element(c, r), element(c + 1, r))
                            : both(element(r, c), element(r, c + 1));
  }
}

// mma .m16n8k16, its fragments as PTX defines them. Products are exact, sums are float32 in the
// order of the depth.
inline void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right_upper,
                         uint32_t right_lower, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  struct Shown {
    uint32_t left[4], right[2];
  };
  const auto* lanes = cuda_on_cpu::exchange(
      Shown{{left[0], left[1], left[2], left[3]}, {right_upper, right_lower}}, {file, line});
  const auto left_at = [&](int row, int k) {
    const auto& lane = lanes[row % 8 * 4 + k % 8 / 2];
    return half(cuda_on_cpu::shown<Shown>(lane).left[row / 8 + k / 8 * 2], k % 2);
  };
  const auto right_at = [&](int k, int column) {
    const auto& lane = lanes[column * 4 + k % 8 / 2];
    return half(cuda_on_cpu::shown<Shown>(lane).right[k / 8], k % 2);
  };
  const int lane = static_cast<int>(threadIdx.x) % cuda_on_cpu::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) sum[i] += left_at(row, k) * right_at(k, column);
  }
}

}  // namespace attr_batch::cuda
