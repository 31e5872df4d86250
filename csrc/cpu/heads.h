// Rows of a [B, heads, rows, C] tensor as the kernels want them: in the accumulation type, channels padded to whole
// vectors, rows close together.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <memory>
#include <new>
#include <type_traits>

#include "vec.h"

namespace megamf {

// Scratch memory of one thread, on a cache line, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new (std::align_val_t(64)) T[size]) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> data_;
};

// bfloat16 is computed in float.
template <class In>
using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <class T>
int64_t padded(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A row stride that is a multiple of 1 KiB would put the rows of a tile into a few sets of the L1 cache.
template <class T>
int64_t spread(int64_t channels) {
  const int64_t width = padded<T>(channels);
  return width * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? width + kLanes<T> : width;
}

template <class In, class T>
MEGAMF_INLINE void read_row(const In* from, T* to, int64_t channels, int64_t width, T scale) {
  for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<T>(from[c]) * scale;
  for (int64_t c = channels; c < width; ++c) to[c] = 0;
}

template <class T, class Out>
MEGAMF_INLINE void write_row(const T* from, Out* to, int64_t channels, T scale) {
  for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<Out>(from[c] * scale);
}

// Read-only rows [B, G, S, channels]; `hold` keeps a staged copy alive.
template <class T>
struct Rows4 {
  const T* data;
  int64_t b, g, s;
  at::Tensor hold;
  const T* row(int64_t ib, int64_t ig, int64_t is) const { return data + ib * b + ig * g + is * s; }
};

// Uses the tensor in place when its layout allows; otherwise copies (dead rows, live_BS[b, s] == 0, become zeros).
template <class In>
Rows4<Acc<In>> stage(const at::Tensor& x_BGSC, const uint8_t* live_BS, bool all_live) {
  using T = Acc<In>;
  const int64_t B = x_BGSC.size(0), G = x_BGSC.size(1), S = x_BGSC.size(2), C = x_BGSC.size(3);
  if constexpr (std::is_same_v<In, T>) {
    if (all_live && x_BGSC.stride(2) == C && C == spread<T>(C))
      return {x_BGSC.const_data_ptr<T>(), x_BGSC.stride(0), x_BGSC.stride(1), x_BGSC.stride(2), x_BGSC};
  }
  const int64_t width = padded<T>(C), pitch = spread<T>(C);
  at::Tensor hold = at::empty({B, G, S, pitch}, x_BGSC.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* out = hold.mutable_data_ptr<T>();
  const In* in = x_BGSC.const_data_ptr<In>();
  const int64_t sb = x_BGSC.stride(0), sg = x_BGSC.stride(1), ss = x_BGSC.stride(2);
  at::parallel_for(0, B * G * S, 256, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t s = n % S, g = n / S % G, b = n / S / G;
      const bool live = all_live || live_BS[b * S + s];
      read_row<In, T>(in + b * sb + g * sg + s * ss, out + n * pitch, live ? C : 0, width, T(1));
    }
  });
  return {out, G * S * pitch, S * pitch, pitch, hold};
}

}  // namespace megamf
