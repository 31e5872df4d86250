// The CPU kernels that bindings.cpp registers (attention: attention.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace megamf {

at::Tensor stickbreaking_scan_cpu(const at::Tensor& logits_XTS, const std::optional<at::Tensor>& start_XT);
at::Tensor stickbreaking_scan_backward_cpu(const at::Tensor& grad_XTS, const at::Tensor& logits_XTS,
                                           const std::optional<at::Tensor>& start_XT);
at::Tensor stickbreaking_decode_cpu(const at::Tensor& q_BHC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
                                    const std::optional<at::Tensor>& start_B, const std::optional<at::Tensor>& key_mask_BS,
                                    double scale, double stop);

std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert_cpu(const at::Tensor& expert_NK, int64_t num_experts);
at::Tensor permute_cpu(const at::Tensor& x_ND, const at::Tensor& order_R, const at::Tensor& inverse_R, int64_t top_k);
void permute_into_cpu(const at::Tensor& x_ND, const at::Tensor& order_R, const at::Tensor& inverse_R, int64_t top_k,
                            const at::Tensor& out_RD);
at::Tensor unpermute_cpu(const at::Tensor& y_RD, const at::Tensor& order_R, const at::Tensor& inverse_R,
                         const std::optional<at::Tensor>& gate_NK, int64_t top_k);
void unpermute_into_cpu(const at::Tensor& y_RD, const at::Tensor& order_R, const at::Tensor& inverse_R,
                              const std::optional<at::Tensor>& gate_NK, int64_t top_k, const at::Tensor& out_ND);
std::tuple<at::Tensor, at::Tensor> unpermute_backward_cpu(const at::Tensor& grad_ND, const at::Tensor& y_RD,
                                                          const at::Tensor& order_R, const at::Tensor& gate_NK);

at::Tensor expert_ffn_cpu(const at::Tensor& x_ND, const at::Tensor& expert_NK, const at::Tensor& gate_EDF,
                          const std::optional<at::Tensor>& up_EDF, const at::Tensor& out_EFO,
                          const std::optional<at::Tensor>& gate_bias_EF, const std::optional<at::Tensor>& up_bias_EF,
                          const std::optional<at::Tensor>& out_bias_O, const std::optional<at::Tensor>& weight_NK,
                          std::string_view activation);

at::Tensor expert_products_cpu(const at::Tensor& x_RD, const at::Tensor& w_LDF, const at::Tensor& count_L);
at::Tensor expert_outer_products_cpu(const at::Tensor& x_RD, const at::Tensor& grad_RF, const at::Tensor& count_L);

}  // namespace megamf
