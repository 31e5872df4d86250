// The CUDA kernels as torch operations (schemas: ../bindings.cpp), through torch's stable ABI: compiles in seconds, needs no
// other CUDA library, and one build serves several versions of torch.
#define TORCH_TARGET_VERSION 0x020b000000000000  // nothing newer than torch 2.11

// Before torch's headers: one of them hides the stream's function unless USE_CUDA is defined.
#ifdef MEGAMF_EMULATE
#include "emulated_device.h"  // tests/cuda: CPU tensors, for kernels built for the host
#else
#include "torch_device.h"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

int32_t type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return MEGAMF_F32;
    case ScalarType::Double:
      return MEGAMF_F64;
    case ScalarType::BFloat16:
      return MEGAMF_BF16;
    case ScalarType::Half:
      return MEGAMF_F16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

using Stream = megamf::cuda::Stream;

void check(int error, const char* op) { STD_TORCH_CHECK(error == 0, op, ": ", megamf::cuda::error_text(error)); }

void check_here(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(megamf::cuda::same_device(x, like), name, " lies on another device");
}

Tensor whole(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Last axis contiguous, the others anywhere.
Tensor rows(const Tensor& x) { return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x); }

void set_start(const MaybeTensor& start, const Tensor& like, const void*& data, int32_t& is_long) {
  if (!start) return;
  check_here(*start, like, "start");
  const ScalarType type = start->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "start must be int32 or int64");
  data = start->const_data_ptr();
  is_long = type == ScalarType::Long;
}

void check_mask(const Tensor& mask, const Tensor& like, int64_t B, int64_t S) {
  check_here(mask, like, "the key mask");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == B && mask.size(1) == S,
                  "the key mask must be bool [", B, ", ", S, "]");
  STD_TORCH_CHECK(mask.stride(1) == 1 || S <= 1, "the key mask must be contiguous along the keys");
}

// Scan of [..., T, S]: every row has a start of its own.
MegamfScan scan_of(const Tensor& logits, const MaybeTensor& start) {
  MegamfScan scan = {};
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(dims >= 2 && logits.size(dims - 2) <= logits.size(dims - 1), "logits must be [..., T, S] with T <= S");
  scan.logits = logits.const_data_ptr();
  scan.T = logits.size(dims - 2);
  scan.S = logits.size(dims - 1);
  scan.rows = scan.S > 0 ? logits.numel() / scan.S : 0;
  scan.rows_a_batch = scan.T;
  scan.heads = 1;
  scan.scale = 1;
  scan.log_stop = -120;
  scan.causal = 1;
  scan.type = scan.out_type = type_of(logits);
  set_start(start, logits, scan.start, scan.start_is_long);
  STD_TORCH_CHECK(!start || start->numel() == scan.rows, "start must have the shape of the logits without the key axis");
  scan.start_stride = scan.T;
  return scan;
}

Tensor scan_cuda(Tensor logits_XTS, MaybeTensor start_XT) {
  const Stream here(logits_XTS);
  const Tensor logits = whole(logits_XTS);
  const MaybeTensor start = start_XT ? MaybeTensor(whole(*start_XT)) : std::nullopt;
  Tensor weights = torch::stable::new_empty(logits, logits.sizes());
  const MegamfScan scan = scan_of(logits, start);
  check(megamf_scan_forward(&scan, weights.mutable_data_ptr(), nullptr, here.stream), "stickbreaking_scan");
  return weights;
}

Tensor scan_backward_cuda(Tensor grad_XTS, Tensor logits_XTS, MaybeTensor start_XT) {
  const Stream here(logits_XTS);
  const Tensor logits = whole(logits_XTS), grad = whole(grad_XTS);
  STD_TORCH_CHECK(type_of(grad) == type_of(logits) && grad.numel() == logits.numel(), "grad does not fit the logits");
  check_here(grad, logits, "grad");
  const MaybeTensor start = start_XT ? MaybeTensor(whole(*start_XT)) : std::nullopt;
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  const MegamfScan scan = scan_of(logits, start);
  check(megamf_scan_backward(&scan, grad.const_data_ptr(), nullptr, nullptr, out.mutable_data_ptr(), here.stream),
        "stickbreaking_scan_backward");
  return out;
}

// Scan of the rows [batch * key heads, queries * heads, S] of a chunk of attention.
MegamfScan chunk_of(const Tensor& logits_MQS, const MaybeTensor& start_BT, const MaybeTensor& mask_BS, int64_t batch, int64_t queries,
                    int64_t heads, double scale, double log_stop, bool causal, const Tensor& out) {
  MegamfScan scan = {};
  STD_TORCH_CHECK(logits_MQS.dim() == 3 && logits_MQS.is_contiguous(), "logits must be contiguous [M, Q, S]");
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == logits_MQS.numel(), "the results must have the shape of the logits");
  const int64_t M = logits_MQS.size(0), Q = logits_MQS.size(1);
  STD_TORCH_CHECK(batch > 0 && M % batch == 0 && queries * heads == Q, "rows [", M, ", ", Q, "] are not a chunk of ", batch,
                  " sequences of ", queries, " queries of ", heads, " heads");
  scan.logits = logits_MQS.const_data_ptr();
  scan.rows = M * Q;
  scan.rows_a_batch = M / batch * Q;
  scan.heads = heads;
  scan.T = queries;
  scan.S = logits_MQS.size(2);
  STD_TORCH_CHECK(!causal || scan.T <= scan.S, "more queries than keys");
  scan.scale = static_cast<float>(scale);
  scan.log_stop = static_cast<float>(log_stop);
  scan.causal = causal;
  scan.type = type_of(logits_MQS);
  scan.out_type = type_of(out);
  set_start(start_BT, logits_MQS, scan.start, scan.start_is_long);
  if (start_BT) {
    STD_TORCH_CHECK(start_BT->dim() == 2 && start_BT->size(0) == batch && start_BT->size(1) == queries &&
                        (start_BT->stride(1) == 1 || queries <= 1),
                    "start must be [", batch, ", ", queries, "], contiguous along the queries");
    scan.start_stride = start_BT->stride(0);
  }
  if (mask_BS) {
    check_mask(*mask_BS, logits_MQS, batch, scan.S);
    scan.mask = static_cast<const uint8_t*>(mask_BS->const_data_ptr());
    scan.mask_stride = mask_BS->stride(0);
  }
  return scan;
}

void rows_cuda(Tensor logits_MQS, MaybeTensor start_BT, MaybeTensor mask_BS, int64_t batch, int64_t queries, int64_t heads,
               double scale, double log_stop, bool causal, Tensor weights_MQS, Tensor log_rem_MQ) {
  const Stream here(logits_MQS);
  const MegamfScan scan = chunk_of(logits_MQS, start_BT, mask_BS, batch, queries, heads, scale, log_stop, causal, weights_MQS);
  check_here(weights_MQS, logits_MQS, "weights");
  STD_TORCH_CHECK(log_rem_MQ.is_contiguous() && log_rem_MQ.numel() == scan.rows && type_of(log_rem_MQ) == MEGAMF_F32,
                  "log_rem must be float32 [M, Q]");
  check(megamf_scan_forward(&scan, weights_MQS.mutable_data_ptr(), static_cast<float*>(log_rem_MQ.mutable_data_ptr()), here.stream),
        "stickbreaking_rows");
}

void rows_backward_cuda(Tensor grad_MQS, MaybeTensor grad_log_rem_MQ, Tensor logits_MQS, MaybeTensor start_BT, MaybeTensor mask_BS,
                        int64_t batch, int64_t queries, int64_t heads, double scale, double log_stop, bool causal,
                        Tensor weights_MQS, Tensor grad_logits_MQS) {
  const Stream here(logits_MQS);
  const MegamfScan scan = chunk_of(logits_MQS, start_BT, mask_BS, batch, queries, heads, scale, log_stop, causal, grad_logits_MQS);
  STD_TORCH_CHECK(grad_MQS.is_contiguous() && grad_MQS.numel() == logits_MQS.numel() && type_of(grad_MQS) == scan.type,
                  "grad must be contiguous, of the shape and type of the logits");
  STD_TORCH_CHECK(weights_MQS.is_contiguous() && weights_MQS.numel() == logits_MQS.numel() && type_of(weights_MQS) == scan.out_type,
                  "weights must be of the shape and type of the gradient");
  const float* rest = nullptr;
  if (grad_log_rem_MQ) {
    STD_TORCH_CHECK(grad_log_rem_MQ->is_contiguous() && grad_log_rem_MQ->numel() == scan.rows &&
                        type_of(*grad_log_rem_MQ) == MEGAMF_F32,
                    "the gradient of log_rem must be float32 [M, Q]");
    rest = static_cast<const float*>(grad_log_rem_MQ->const_data_ptr());
  }
  check(megamf_scan_backward(&scan, grad_MQS.const_data_ptr(), rest, weights_MQS.mutable_data_ptr(),
                             grad_logits_MQS.mutable_data_ptr(), here.stream),
        "stickbreaking_rows_backward");
}

Tensor decode_cuda(Tensor q_BHC, Tensor k_BGSC, Tensor v_BGSC, MaybeTensor start_B, MaybeTensor mask_BS, double scale,
                   double log_stop) {
  const Stream here(q_BHC);
  STD_TORCH_CHECK(q_BHC.dim() == 3 && k_BGSC.dim() == 4 && v_BGSC.dim() == 4, "expected q [B, H, C], k and v [B, G, S, C]");
  const Tensor q = rows(q_BHC), k = rows(k_BGSC), v = rows(v_BGSC);
  MegamfDecode d = {};
  d.B = q.size(0), d.H = q.size(1), d.C = q.size(2), d.G = k.size(1), d.S = k.size(2);
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(x->size(0) == d.B && x->size(1) == d.G && x->size(2) == d.S && x->size(3) == d.C && type_of(*x) == type_of(q),
                    "q, k and v do not fit together");
  STD_TORCH_CHECK(d.G > 0 && d.H % d.G == 0 && d.C <= kMegamfDecodeChannels, "H = ", d.H, " must be a multiple of G = ", d.G,
                  ", and C = ", d.C, " at most ", kMegamfDecodeChannels);
  check_here(k, q, "k");
  check_here(v, q, "v");
  d.q = q.const_data_ptr(), d.k = k.const_data_ptr(), d.v = v.const_data_ptr();
  for (int i = 0; i < 2; ++i) d.q_strides[i] = q.stride(i);
  for (int i = 0; i < 3; ++i) d.k_strides[i] = k.stride(i), d.v_strides[i] = v.stride(i);
  set_start(start_B, q, d.start, d.start_is_long);
  if (start_B) {
    STD_TORCH_CHECK(start_B->dim() == 1 && start_B->size(0) == d.B, "start must be [", d.B, "]");
    d.start_stride = start_B->stride(0);
  }
  if (mask_BS) {
    check_mask(*mask_BS, q, d.B, d.S);
    d.mask = static_cast<const uint8_t*>(mask_BS->const_data_ptr());
    d.mask_stride = mask_BS->stride(0);
  }
  d.scale = static_cast<float>(scale);
  d.log_stop = static_cast<float>(log_stop);
  d.type = type_of(q);
  d.parts = megamf_decode_parts(d.B, d.H, d.G, d.S, megamf::cuda::processors(q));
  Tensor o = torch::stable::new_empty(q, std::vector<int64_t>{d.B, d.H, d.C});
  Tensor partial_o = torch::stable::new_empty(q, std::vector<int64_t>{d.B, d.H, d.parts, d.C}, ScalarType::Float);
  Tensor partial_log = torch::stable::new_empty(q, std::vector<int64_t>{d.B, d.H, d.parts}, ScalarType::Float);
  check(megamf_decode(&d, static_cast<float*>(partial_o.mutable_data_ptr()), static_cast<float*>(partial_log.mutable_data_ptr()),
                      o.mutable_data_ptr(), here.stream),
        "stickbreaking_decode");
  return o;
}

const int64_t* indices(const Tensor& x, const Tensor& like, int64_t rows, const char* name) {
  check_here(x, like, name);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == rows && x.scalar_type() == ScalarType::Long && x.is_contiguous(), name,
                  " must be contiguous int64 [", rows, "]");
  return static_cast<const int64_t*>(x.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> sort_cuda(Tensor expert_NK, int64_t E) {
  const Stream here(expert_NK);
  STD_TORCH_CHECK(expert_NK.scalar_type() == ScalarType::Long, "expert_NK must be int64");
  STD_TORCH_CHECK(E >= 0 && E <= kMegamfExperts, "num_experts = ", E, ", expected 0 to ", kMegamfExperts);
  const Tensor expert = whole(expert_NK);
  const int64_t R = expert.numel();
  STD_TORCH_CHECK(E > 0 || R == 0, "copies to sort, but no experts");
  Tensor order = torch::stable::new_empty(expert, std::vector<int64_t>{R});
  Tensor inverse = torch::stable::new_empty(expert, std::vector<int64_t>{R});
  Tensor count = torch::stable::new_empty(expert, std::vector<int64_t>{E});
  const int64_t blocks = megamf_sort_blocks(R);
  Tensor scratch = torch::stable::new_empty(expert, std::vector<int64_t>{(blocks > 0 ? blocks : 1) * E}, ScalarType::Int);
  check(megamf_sort(static_cast<const int64_t*>(expert.const_data_ptr()), R, E, static_cast<int32_t*>(scratch.mutable_data_ptr()),
                    static_cast<int64_t*>(order.mutable_data_ptr()), static_cast<int64_t*>(inverse.mutable_data_ptr()),
                    static_cast<int64_t*>(count.mutable_data_ptr()), here.stream),
        "sort_by_expert");
  return {order, inverse, count};
}

Tensor permute_cuda(Tensor x_ND, Tensor order_R, Tensor inverse_R, int64_t top_k) {
  const Stream here(x_ND);
  STD_TORCH_CHECK(x_ND.dim() == 2 && top_k > 0, "permute: expected x [N, D] and top_k >= 1");
  const Tensor x = whole(x_ND);
  const int64_t N = x.size(0), D = x.size(1);
  indices(order_R, x, N * top_k, "order_R");
  const int64_t* inverse = indices(inverse_R, x, N * top_k, "inverse_R");
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{N * top_k, D});
  check(megamf_permute(x.const_data_ptr(), inverse, N, top_k, D * static_cast<int64_t>(x.element_size()), out.mutable_data_ptr(),
                       here.stream),
        "permute");
  return out;
}

Tensor unpermute_cuda(Tensor y_RD, Tensor order_R, Tensor inverse_R, MaybeTensor gate_NK, int64_t top_k) {
  const Stream here(y_RD);
  STD_TORCH_CHECK(y_RD.dim() == 2 && top_k > 0 && y_RD.size(0) % top_k == 0, "unpermute: expected y [N * top_k, D]");
  const Tensor y = whole(y_RD);
  const int64_t R = y.size(0), D = y.size(1), N = R / top_k;
  indices(order_R, y, R, "order_R");
  const int64_t* inverse = indices(inverse_R, y, R, "inverse_R");
  const MaybeTensor gate = gate_NK ? MaybeTensor(whole(*gate_NK)) : std::nullopt;
  if (gate) {
    check_here(*gate, y, "gate");
    STD_TORCH_CHECK(gate->dim() == 2 && gate->size(0) == N && gate->size(1) == top_k, "gate must be [", N, ", ", top_k, "]");
  }
  Tensor out = torch::stable::new_empty(y, std::vector<int64_t>{N, D});
  check(megamf_unpermute(y.const_data_ptr(), inverse, gate ? gate->const_data_ptr() : nullptr, N, top_k, D, type_of(y),
                         gate ? type_of(*gate) : MEGAMF_F32, out.mutable_data_ptr(), here.stream),
        "unpermute");
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward_cuda(Tensor grad_ND, Tensor y_RD, Tensor order_R, Tensor gate_NK) {
  const Stream here(y_RD);
  const Tensor grad = whole(grad_ND), y = whole(y_RD), gate = whole(gate_NK);
  STD_TORCH_CHECK(grad.dim() == 2 && y.dim() == 2 && gate.dim() == 2 && grad.size(1) == y.size(1) && gate.size(0) == grad.size(0) &&
                      gate.numel() == y.size(0) && type_of(grad) == type_of(y),
                  "unpermute_backward: grad, y and gate do not fit together");
  const int64_t R = y.size(0), D = y.size(1);
  const int64_t* order = indices(order_R, y, R, "order_R");
  check_here(grad, y, "grad");
  check_here(gate, y, "gate");
  Tensor grad_y = torch::stable::new_empty(y, y.sizes()), grad_gate = torch::stable::new_empty(gate, gate.sizes());
  check(megamf_unpermute_backward(grad.const_data_ptr(), y.const_data_ptr(), order, gate.const_data_ptr(), R, gate.size(1), D,
                                  type_of(y), type_of(gate), grad_y.mutable_data_ptr(), grad_gate.mutable_data_ptr(), here.stream),
        "unpermute_backward");
  return {grad_y, grad_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MEGAMF_NAMESPACE, MEGAMF_DEVICE, m) {
  m.impl("stickbreaking_scan", TORCH_BOX(&scan_cuda));
  m.impl("stickbreaking_scan_backward", TORCH_BOX(&scan_backward_cuda));
  m.impl("stickbreaking_rows", TORCH_BOX(&rows_cuda));
  m.impl("stickbreaking_rows_backward", TORCH_BOX(&rows_backward_cuda));
  m.impl("stickbreaking_decode_parts", TORCH_BOX(&decode_cuda));
  m.impl("sort_by_expert", TORCH_BOX(&sort_cuda));
  m.impl("permute", TORCH_BOX(&permute_cuda));
  m.impl("unpermute", TORCH_BOX(&unpermute_cuda));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward_cuda));
}
