// The CUDA kernels as plain functions: device pointers and a stream (cudaStream_t) in, an error (cudaError_t; 0 is success) out.
// No torch, no CUDA header, no synchronisation, nothing allocated. Every result is the same bits in every run.
#pragma once

#include <cstdint>

enum MegamfType : int32_t { MEGAMF_F32 = 0, MEGAMF_F64 = 1, MEGAMF_BF16 = 2, MEGAMF_F16 = 3 };

extern "C" {

// Rows of logits [batch, key head, query, head of the group] x S, contiguous. causal: query t of T stands at position S - T + t
// and sees the keys up to it; otherwise it sees all S.
struct MegamfScan {
  const void* logits;
  const void* start;     // null, or int32 (int64 when start_is_long): first key of (batch b, query t) at [b * start_stride + t]
  const uint8_t* mask;   // null, or 0 for hidden keys: key j of batch b at [b * mask_stride + j]
  int64_t start_stride, mask_stride;
  int64_t rows, rows_a_batch, heads, T, S;
  float scale;           // factor of the logits
  float log_stop;        // a row's older keys get 0 once the logarithm of its stick is below this, in steps of 256 keys
  int32_t causal, start_is_long;
  int32_t type, out_type;  // of the logits and their incoming gradient; of the results. Equal, or logits of MEGAMF_F32
};

// weights may be the logits themselves when the types are equal. log_rem (may be null): float [rows], natural logarithm of what
// is left of each stick.
int megamf_scan_forward(const MegamfScan* scan, void* weights, float* log_rem, void* stream);

// grad: of the weights; grad_log_rem (may be null): of log_rem. weights (may be null): written anew. grad_logits: gradient of the
// logits before scale; may be grad itself when the types are equal.
int megamf_scan_backward(const MegamfScan* scan, const void* grad, const float* grad_log_rem, void* weights, void* grad_logits,
                         void* stream);

// One query a sequence: q [B, H, C] against k, v [B, G, S, C] -> o [B, H, C] contiguous. Strides in elements; channels contiguous.
struct MegamfDecode {
  const void *q, *k, *v;
  const void* start;   // null, or first key of sequence b at [b * start_stride]
  const uint8_t* mask; // null, or 0 for hidden keys, [b * mask_stride + j]
  int64_t q_strides[2], k_strides[3], v_strides[3];
  int64_t start_stride, mask_stride, B, H, G, S, C, parts;
  float scale, log_stop;
  int32_t start_is_long, type;
};

constexpr int64_t kMegamfDecodeChannels = 2048;  // at most

// How many parts of the keys run side by side.
int64_t megamf_decode_parts(int64_t B, int64_t H, int64_t G, int64_t S, int64_t processors);

// partial_o: float [B, H, parts, C], partial_log: float [B, H, parts]: scratch.
int megamf_decode(const MegamfDecode* decode, float* partial_o, float* partial_log, void* o, void* stream);

// Blocks of the sort; scratch: int32 [max(blocks, 1) * E].
int64_t megamf_sort_blocks(int64_t R);
constexpr int64_t kMegamfExperts = 12288;  // at most

// expert [R] in 0..E-1 -> order, inverse [R], count [E]: the stable order by expert.
int megamf_sort(const int64_t* expert, int64_t R, int64_t E, int32_t* scratch, int64_t* order, int64_t* inverse, int64_t* count,
                void* stream);

// out[inverse[n * K + k]] = x[n]: rows of `bytes` bytes.
int megamf_permute(const void* x, const int64_t* inverse, int64_t N, int64_t K, int64_t bytes, void* out, void* stream);

// out[n] = sum over k of gate[n, k] * y[inverse[n * K + k]], in float (double for MEGAMF_F64); gate null: ones.
int megamf_unpermute(const void* y, const int64_t* inverse, const void* gate, int64_t N, int64_t K, int64_t D, int32_t type,
                     int32_t gate_type, void* out, void* stream);

// grad_y[r] = gate[nk] * grad[nk / K], grad_gate[nk] = grad[nk / K] . y[r], with nk = order[r].
int megamf_unpermute_backward(const void* grad, const void* y, const int64_t* order, const void* gate, int64_t R, int64_t K,
                              int64_t D, int32_t type, int32_t gate_type, void* grad_y, void* grad_gate, void* stream);

}  // extern "C"
