// Where tensors lie and run, for binding.cpp.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA
#endif
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#define MEGAMF_NAMESPACE megamf
#define MEGAMF_DEVICE CUDA

namespace megamf::cuda {
namespace {

using torch::stable::Tensor;

// The device of a tensor, made current, and its stream.
struct Stream {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit Stream(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0, "no current CUDA stream");
  }
};

inline bool same_device(const Tensor& x, const Tensor& like) {
  return x.is_cuda() && x.get_device_index() == like.get_device_index();
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

inline int64_t processors(const Tensor& x) {
  int count = 0;
  const int error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index());
  STD_TORCH_CHECK(error == 0, "no number of multiprocessors: ", error_text(error));
  return count;
}

}  // namespace
}  // namespace megamf::cuda
