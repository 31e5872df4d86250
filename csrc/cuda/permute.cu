// Rows to their experts and back. Every row that is written has one writer and every sum one order.
#include "device.h"
#include "kernels.h"

namespace megamf::cuda {
namespace {

constexpr int kThreads = 256;

// How many neighbouring lanes (a power of two, at most a warp) share a row of `items` items.
int lanes_for(int64_t items) {
  int width = 1;
  while (width < kLanes && width < items) width *= 2;
  return width;
}

__device__ __forceinline__ int64_t checked(int64_t index, int64_t rows) {
  MEGAMF_DEVICE_CHECK(index >= 0 && index < rows);
  return index;
}

// A token's row is read once and written K times.
template <class V>
__global__ void __launch_bounds__(kThreads)
    permute_rows(const V* x, const int64_t* inverse, int64_t N, int64_t K, int64_t items, int width, V* out) {
  constexpr int kAhead = 4;
  const int64_t n = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / width;
  const int lane = threadIdx.x % width;
  if (n >= N) return;
  for (int64_t c0 = lane; c0 < items; c0 += kAhead * width) {
    V part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (c0 + i * width < items) part[i] = x[n * items + c0 + i * width];
    for (int64_t k = 0; k < K; ++k) {
      V* row = out + checked(inverse[n * K + k], N * K) * items;
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (c0 + i * width < items) row[c0 + i * width] = part[i];
    }
  }
}

template <class A>
__device__ __forceinline__ A read_gate(const void* gate, int32_t type, int64_t i) {
  switch (type) {
    case MEGAMF_F32:
      return static_cast<A>(static_cast<const float*>(gate)[i]);
    case MEGAMF_F64:
      return static_cast<A>(static_cast<const double*>(gate)[i]);
    case MEGAMF_BF16:
      return static_cast<A>(widen(static_cast<const bf16*>(gate)[i]));
    default:
      return static_cast<A>(widen(static_cast<const f16*>(gate)[i]));
  }
}

template <class A>
__device__ __forceinline__ void write_gate(void* gate, int32_t type, int64_t i, A x) {
  switch (type) {
    case MEGAMF_F32:
      static_cast<float*>(gate)[i] = static_cast<float>(x);
      break;
    case MEGAMF_F64:
      static_cast<double*>(gate)[i] = static_cast<double>(x);
      break;
    case MEGAMF_BF16:
      static_cast<bf16*>(gate)[i] = narrow<bf16>(static_cast<float>(x));
      break;
    default:
      static_cast<f16*>(gate)[i] = narrow<f16>(static_cast<float>(x));
  }
}

// Channels c .. c + 7 of a row, as far as they exist.
struct Part {
  bool whole;
  int count;
  __device__ __forceinline__ Part(int64_t c, int64_t D, int aligned)
      : whole(aligned && c + kGroup <= D), count(D - c < kGroup ? static_cast<int>(D - c) : kGroup) {}
};

template <class T>
__global__ void __launch_bounds__(kThreads) unpermute_rows(const T* y, const int64_t* inverse, const void* gate, int32_t gate_type,
                                                           int64_t N, int64_t K, int64_t D, int aligned, int width, T* out) {
  using A = Acc<T>;
  const int64_t n = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / width;
  if (n >= N) return;
  for (int64_t c = threadIdx.x % width * int64_t(kGroup); c < D; c += width * kGroup) {
    const Part part(c, D, aligned);
    A sum[kGroup] = {};
#pragma unroll 4
    for (int64_t k = 0; k < K; ++k) {
      const A weight = gate ? read_gate<A>(gate, gate_type, n * K + k) : A(1);
      A x[kGroup];
      load_group(y + checked(inverse[n * K + k], N * K) * D + c, part.whole, 0, part.count, x);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sum[i] += weight * x[i];
    }
    store_group(out + n * D + c, part.whole, 0, part.count, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unpermute_rows_backward(const T* grad, const T* y, const int64_t* order, const void* gate, int32_t gate_type, int64_t R, int64_t K,
                            int64_t D, int aligned, int width, T* grad_y, void* grad_gate) {
  using A = Acc<T>;
  const int64_t r = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / width;
  const int lane = threadIdx.x % width;
  const bool live = r < R;  // lanes without a row still take part in the sum
  const int64_t nk = live ? checked(order[r], R) : 0;
  const A weight = live ? read_gate<A>(gate, gate_type, nk) : A(0);
  A dot = 0;
  for (int64_t c = lane * int64_t(kGroup); live && c < D; c += width * kGroup) {
    const Part part(c, D, aligned);
    A g[kGroup], x[kGroup];
    load_group(grad + nk / K * D + c, part.whole, 0, part.count, g);
    load_group(y + r * D + c, part.whole, 0, part.count, x);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      dot += g[i] * x[i];
      g[i] *= weight;
    }
    store_group(grad_y + r * D + c, part.whole, 0, part.count, g);
  }
  dot = sum_lanes(dot, width);
  if (live && lane == 0) write_gate(grad_gate, gate_type, nk, dot);
}

template <class V>
int copy_rows(const void* x, const int64_t* inverse, int64_t N, int64_t K, int64_t bytes, void* out, void* stream) {
  const int64_t items = bytes / static_cast<int64_t>(sizeof(V));
  const int width = lanes_for(items);
  return launch(&permute_rows<V>, ceil_div(N * width, kThreads), kThreads, 0, stream, static_cast<const V*>(x), inverse, N, K, items,
                width, static_cast<V*>(out));
}

template <class T>
int aligned_rows(int64_t D, const void* a, const void* b, const void* c) {
  const bool ok = D % kGroup == 0;
  for (const void* p : {a, b, c})
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return 0;
  return ok;
}

struct Combine {
  const void* y;
  const int64_t* inverse;
  const void* gate;
  int64_t N, K, D;
  int32_t gate_type;
  void *out, *stream;
  template <class T>
  int run() const {
    const int width = lanes_for(ceil_div(D, kGroup));
    return launch(&unpermute_rows<T>, ceil_div(N * width, kThreads), kThreads, 0, stream, static_cast<const T*>(y), inverse, gate,
                  gate_type, N, K, D, aligned_rows<T>(D, y, out, out), width, static_cast<T*>(out));
  }
};

struct CombineBackward {
  const void *grad, *y;
  const int64_t* order;
  const void* gate;
  int64_t R, K, D;
  int32_t gate_type;
  void *grad_y, *grad_gate, *stream;
  template <class T>
  int run() const {
    const int width = lanes_for(ceil_div(D, kGroup));
    return launch(&unpermute_rows_backward<T>, ceil_div(R * width, kThreads), kThreads, 0, stream, static_cast<const T*>(grad),
                  static_cast<const T*>(y), order, gate, gate_type, R, K, D, aligned_rows<T>(D, grad, y, grad_y), width,
                  static_cast<T*>(grad_y), grad_gate);
  }
};

template <class F>
int with_type(int32_t type, const F& run) {
  switch (type) {
    case MEGAMF_F32:
      return run.template run<float>();
    case MEGAMF_F64:
      return run.template run<double>();
    case MEGAMF_BF16:
      return run.template run<bf16>();
    case MEGAMF_F16:
      return run.template run<f16>();
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace megamf::cuda

extern "C" int megamf_permute(const void* x, const int64_t* inverse, int64_t N, int64_t K, int64_t bytes, void* out, void* stream) {
  using namespace megamf::cuda;
  if (N * K * bytes == 0) return 0;
  const auto ways = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(bytes);
  if (ways % 16 == 0) return copy_rows<uint4>(x, inverse, N, K, bytes, out, stream);
  if (ways % 4 == 0) return copy_rows<uint32_t>(x, inverse, N, K, bytes, out, stream);
  if (ways % 2 == 0) return copy_rows<uint16_t>(x, inverse, N, K, bytes, out, stream);
  return copy_rows<uint8_t>(x, inverse, N, K, bytes, out, stream);
}

extern "C" int megamf_unpermute(const void* y, const int64_t* inverse, const void* gate, int64_t N, int64_t K, int64_t D,
                                int32_t type, int32_t gate_type, void* out, void* stream) {
  using namespace megamf::cuda;
  if (N * D == 0) return 0;
  return with_type(type, Combine{y, inverse, gate, N, K, D, gate_type, out, stream});
}

extern "C" int megamf_unpermute_backward(const void* grad, const void* y, const int64_t* order, const void* gate, int64_t R, int64_t K,
                                         int64_t D, int32_t type, int32_t gate_type, void* grad_y, void* grad_gate, void* stream) {
  using namespace megamf::cuda;
  if (R == 0) return 0;
  return with_type(type, CombineBackward{grad, y, order, gate, R, K, D, gate_type, grad_y, grad_gate, stream});
}
