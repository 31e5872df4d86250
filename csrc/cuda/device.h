// What every kernel file includes: the language, number types, 16-byte accesses and warp sums.
#pragma once

#ifdef MEGAMF_EMULATE
#include "emulator.h"  // tests/cuda: the kernels on the host, thread by thread
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MEGAMF_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char megamf_shared[]; \
  type* const name = reinterpret_cast<type*>(megamf_shared)
#endif

#include <cstring>
#include <type_traits>

#include "arith.h"

// Like assert, in every build: an index from outside must not become an address. It ends the kernel and spoils the context,
// as torch's own index checks on the device do, because raising an exception would have to wait for the device.
#ifdef MEGAMF_EMULATE
#define MEGAMF_DEVICE_CHECK(ok) (void)((ok) || (emulator::fail(#ok), 0))
#else
#define MEGAMF_DEVICE_CHECK(ok) (void)((ok) || (__trap(), 0))
#endif

namespace megamf::cuda {

#ifndef MEGAMF_EMULATE
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream, A... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, f16>)
    return __float2half_rn(x);
  else
    return x;
}

// The address of an array in elements of T; -1 when it is not a multiple of their size.
template <class T>
int64_t element_address(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return at % sizeof(T) == 0 ? static_cast<int64_t>(at / sizeof(T)) : -1;
}

// kGroup elements at p; `whole` means that p is aligned to them and all exist. Otherwise those with begin <= i < end are read,
// the others are 0.
template <class T>
__device__ __forceinline__ void load_group(const T* p, bool whole, int begin, int end, Acc<T> (&x)[kGroup]) {
  T raw[kGroup];
  if (whole) {
    constexpr int kQuads = kGroup * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const uint4 quad = reinterpret_cast<const uint4*>(p)[i];
      memcpy(raw + i * (kGroup / kQuads), &quad, 16);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = widen(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = i >= begin && i < end ? widen(p[i]) : Acc<T>(0);
  }
}

template <class T>
__device__ __forceinline__ void store_group(T* p, bool whole, int begin, int end, const Acc<T> (&x)[kGroup]) {
  if (whole) {
    T raw[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) raw[i] = narrow<T>(x[i]);
    constexpr int kQuads = kGroup * sizeof(T) / 16;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      uint4 quad;
      memcpy(&quad, raw + i * (kGroup / kQuads), 16);
      reinterpret_cast<uint4*>(p)[i] = quad;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i >= begin && i < end) p[i] = narrow<T>(x[i]);
  }
}

constexpr unsigned kAllLanes = 0xffffffffu;

// Sums over this and the higher lanes, and (exclusive) over the higher lanes alone. Nothing is subtracted: -inf may occur.
struct LaneSums {
  float inclusive, exclusive;
};

__device__ __forceinline__ LaneSums suffix_sums(float x, int lane) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const float other = __shfl_down_sync(kAllLanes, x, d);
    if (lane + d < kLanes) x += other;
  }
  const float next = __shfl_down_sync(kAllLanes, x, 1);
  return {x, lane + 1 < kLanes ? next : 0.0f};
}

// The same towards the lower lanes.
__device__ __forceinline__ LaneSums prefix_sums(float x, int lane) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const float other = __shfl_up_sync(kAllLanes, x, d);
    if (lane >= d) x += other;
  }
  const float before = __shfl_up_sync(kAllLanes, x, 1);
  return {x, lane > 0 ? before : 0.0f};
}

// The sum over `width` neighbouring lanes (a power of two), the same bits in all of them.
template <class T>
__device__ __forceinline__ T sum_lanes(T x, int width) {
  for (int d = width / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

}  // namespace megamf::cuda
