// Runs CUDA kernels on the host: every thread of a block is a fiber, blocks run one after the other. A fiber gives way only at
// a barrier or a warp operation, which make it wait for the others; when nobody can go on, that is a deadlock and an error.
// Shared memory is poisoned with NaN. MEGAMF_EMULATE_REVERSE=1 lets the threads run in the opposite order: a result that
// depends on it lacks a barrier.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define MEGAMF_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulator::shared.data())

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int cudaErrorInvalidValue = 1;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

struct Barrier {
  int waiting = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[kWarp];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
};

inline std::vector<unsigned char> shared;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline ucontext_t scheduler;
inline int current = 0;
inline bool progress = false;
inline std::function<void()> body;

inline void wait(Barrier& barrier, int expected) {
  const long generation = barrier.generation;
  progress = true;
  if (++barrier.waiting == expected) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&fibers[current]->context, &scheduler);
}

inline Warp& warp() { return warps[threadIdx.x / kWarp]; }
inline void wait_warp() { wait(warp().barrier, kWarp); }

inline void run_fiber() {
  body();
  fibers[current]->done = true;
  progress = true;
}

inline void run_block(int threads) {
  const char* wish = std::getenv("MEGAMF_EMULATE_REVERSE");
  const bool reverse = wish != nullptr && *wish == '1';
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  block = Barrier{};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    progress = false;
    left = 0;
    for (int n = 0; n < threads; ++n) {
      current = reverse ? threads - 1 - n : n;
      if (fibers[current]->done) continue;
      threadIdx = {static_cast<unsigned>(current)};
      swapcontext(&scheduler, &fibers[current]->context);
      left += !fibers[current]->done;
    }
    if (left > 0 && !progress) fail("deadlock: some threads wait for others that do not come");
  }
}

template <class T>
uint64_t bits(T x) {
  uint64_t out = 0;
  std::memcpy(&out, &x, sizeof x);
  return out;
}

template <class T>
T exchange(T mine, int from) {
  const int lane = threadIdx.x % kWarp;
  Warp& w = warp();
  w.slot[lane] = bits(mine);
  wait_warp();
  T out = mine;
  if (from >= 0 && from < kWarp) std::memcpy(&out, &w.slot[from], sizeof out);
  wait_warp();
  return out;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block, static_cast<int>(blockDim.x)); }
inline void __syncwarp() { emulator::wait_warp(); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return emulator::exchange(x, from);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int d) {
  return emulator::exchange(x, static_cast<int>(threadIdx.x % 32) + d);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int d) {
  return emulator::exchange(x, static_cast<int>(threadIdx.x % 32) - d);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int d) {
  return emulator::exchange(x, static_cast<int>(threadIdx.x % 32) ^ d);
}
inline unsigned __match_any_sync(unsigned, int x) {
  emulator::Warp& w = emulator::warp();
  w.slot[threadIdx.x % 32] = emulator::bits(x);
  emulator::wait_warp();
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>(w.slot[i] == emulator::bits(x)) << i;
  emulator::wait_warp();
  return same;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                     : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                      : std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (!(size == size)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = exponent < -13 ? -13 : exponent;  // below it the steps are 2^-24
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  // steps = mantissa with its leading 1; a carry out of it moves into the exponent by itself.
  return {static_cast<uint16_t>(sign | (steps + (size < 0x1p-14f && steps < 1024 ? 0 : (exponent + 13) * 1024)))};
}

namespace megamf::cuda {

template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t bytes, void*, A... arguments) {
  emulator::body = [=] { kernel(arguments...); };
  blockDim = {static_cast<unsigned>(threads)};
  gridDim = {static_cast<unsigned>(blocks)};
  if (threads % emulator::kWarp != 0 || threads > 1024 || bytes > 48 * 1024) return cudaErrorInvalidValue;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(i)};
    emulator::shared.assign(bytes + 16, 0xff);
    emulator::run_block(threads);
  }
  return 0;
}

}  // namespace megamf::cuda
