// Stands for csrc/cuda/torch_device.h when the kernels are built for the host: the operations of the namespace
// megamf_emulated, on CPU tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define MEGAMF_NAMESPACE megamf_emulated
#define MEGAMF_DEVICE CPU

namespace megamf::cuda {
namespace {

using torch::stable::Tensor;

struct Stream {
  void* stream = nullptr;
  explicit Stream(const Tensor&) {}
};

inline bool same_device(const Tensor& x, const Tensor&) { return x.is_cpu(); }
inline const char* error_text(int) { return "the emulated kernel failed"; }
inline int64_t processors(const Tensor&) { return 8; }

}  // namespace
}  // namespace megamf::cuda
