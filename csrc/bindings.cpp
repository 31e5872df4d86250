// Names and schemas of the operations, and the empty Python module whose import registers them.
#include <Python.h>

#include <torch/library.h>

#include "cpu/attention.h"
#include "cpu/ops.h"

TORCH_LIBRARY(megamf, m) {
  m.def(
      "stickbreaking_attention(Tensor q_BHTC, Tensor k_BGSC, Tensor v_BGSC, Tensor? start_BT, Tensor? key_mask_BS, float scale, "
      "float stop, bool causal=True) -> Tensor");
  m.def(
      "stickbreaking_attention_rest(Tensor q_BHTC, Tensor k_BGSC, Tensor v_BGSC, Tensor? start_BT, Tensor? key_mask_BS, "
      "float scale, float stop, bool causal=True) -> (Tensor o_BHTC, Tensor log_rem_BHT)");
  m.def(
      "stickbreaking_attention_backward(Tensor grad_o_BHTC, Tensor q_BHTC, Tensor k_BGSC, Tensor v_BGSC, "
      "Tensor? start_BT, Tensor? key_mask_BS, float scale, float stop, Tensor? grad_log_rem_BHT=None, bool causal=True) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "stickbreaking_decode(Tensor q_BHC, Tensor k_BGSC, Tensor v_BGSC, Tensor? start_B, Tensor? key_mask_BS, float scale, "
      "float stop) -> Tensor");
  m.def("stickbreaking_scan(Tensor logits_XTS, Tensor? start_XT) -> Tensor");
  m.def("stickbreaking_scan_backward(Tensor grad_XTS, Tensor logits_XTS, Tensor? start_XT) -> Tensor");
  // On a GPU only: the scan of a chunk of attention (megamf/ops/stickbreaking/cuda.py), and decoding.
  m.def(
      "stickbreaking_rows(Tensor logits_MQS, Tensor? start_BT, Tensor? key_mask_BS, int batch, int queries, int heads, float scale, "
      "float log_stop, bool causal, Tensor(a!) weights_MQS, Tensor(b!) log_rem_MQ) -> ()");
  m.def(
      "stickbreaking_rows_backward(Tensor grad_MQS, Tensor? grad_log_rem_MQ, Tensor logits_MQS, Tensor? start_BT, "
      "Tensor? key_mask_BS, int batch, int queries, int heads, float scale, float log_stop, bool causal, "
      "Tensor(a!) weights_MQS, Tensor(b!) grad_logits_MQS) -> ()");
  m.def(
      "stickbreaking_decode_parts(Tensor q_BHC, Tensor k_BGSC, Tensor v_BGSC, Tensor? start_B, Tensor? key_mask_BS, float scale, "
      "float log_stop) -> Tensor");
  m.def("sort_by_expert(Tensor expert_NK, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("permute(Tensor x_ND, Tensor order_R, Tensor inverse_R, int top_k) -> Tensor");
  m.def("permute_into(Tensor x_ND, Tensor order_R, Tensor inverse_R, int top_k, Tensor(a!) out_RD) -> ()");
  m.def("unpermute(Tensor y_RD, Tensor order_R, Tensor inverse_R, Tensor? gate_NK, int top_k) -> Tensor");
  m.def("unpermute_into(Tensor y_RD, Tensor order_R, Tensor inverse_R, Tensor? gate_NK, int top_k, Tensor(a!) out_ND) -> ()");
  m.def("unpermute_backward(Tensor grad_ND, Tensor y_RD, Tensor order_R, Tensor gate_NK) -> (Tensor, Tensor)");
  m.def("expert_products(Tensor x_RD, Tensor w_LDF, Tensor count_L) -> Tensor");
  m.def("expert_outer_products(Tensor x_RD, Tensor grad_RF, Tensor count_L) -> Tensor");
  m.def(
      "expert_ffn(Tensor x_ND, Tensor expert_NK, Tensor gate_EDF, Tensor? up_EDF, Tensor out_EFO, Tensor? gate_bias_EF, "
      "Tensor? up_bias_EF, Tensor? out_bias_O, Tensor? weight_NK, str activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(megamf, CPU, m) {
  using namespace megamf;
  m.impl("stickbreaking_attention", stickbreaking_attention_cpu);
  m.impl("stickbreaking_attention_rest", stickbreaking_attention_rest_cpu);
  m.impl("stickbreaking_attention_backward", stickbreaking_attention_backward_cpu);
  m.impl("stickbreaking_decode", stickbreaking_decode_cpu);
  m.impl("stickbreaking_scan", stickbreaking_scan_cpu);
  m.impl("stickbreaking_scan_backward", stickbreaking_scan_backward_cpu);
  m.impl("sort_by_expert", sort_by_expert_cpu);
  m.impl("permute", permute_cpu);
  m.impl("permute_into", permute_into_cpu);
  m.impl("unpermute", unpermute_cpu);
  m.impl("unpermute_into", unpermute_into_cpu);
  m.impl("unpermute_backward", unpermute_backward_cpu);
  m.impl("expert_products", expert_products_cpu);
  m.impl("expert_outer_products", expert_outer_products_cpu);
  m.impl("expert_ffn", expert_ffn_cpu);
}

PyMODINIT_FUNC PyInit__C() {
#if defined(__x86_64__)
  // Built for this very machine by default: say so, rather than die of an illegal instruction on another.
#if defined(__AVX512F__)
  const bool fits = __builtin_cpu_supports("avx512f");
  const char* need = "megamf._C was built for a CPU with AVX-512; rebuild it here, or with MEGAMF_MARCH=x86-64-v3";
#elif defined(__AVX2__)
  const bool fits = __builtin_cpu_supports("avx2");
  const char* need = "megamf._C was built for a CPU with AVX2; rebuild it here, or with MEGAMF_MARCH=x86-64";
#else
  const bool fits = true;
  const char* need = "";
#endif
  if (!fits) {
    PyErr_SetString(PyExc_ImportError, need);
    return nullptr;
  }
#endif
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "megamf._C", "Importing this module registers torch.ops.megamf.*", -1,
                               nullptr,               nullptr,     nullptr,                                              nullptr, nullptr};
  return PyModule_Create(&module);
}
