// One query a sequence against a cache of S keys. Memory-bound: keys and values are read once, from the newest on.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "ops.h"

namespace megamf {

namespace {

constexpr int64_t kChunk = 64;

template <class In>
MEGAMF_INLINE Vec<Acc<In>> widen(const In* p) {
  using T = Acc<In>;
  if constexpr (std::is_same_v<In, T>) {
    return load(p);
  } else {
    alignas(64) T wide[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) wide[i] = static_cast<T>(p[i]);
    return load(wide);
  }
}

template <class In>
Acc<In> dot(const Acc<In>* q, const In* k, int64_t C) {
  using T = Acc<In>;
  constexpr int64_t kStep = kLanes<T>;
  Vec<T> even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * kStep <= C; c += 2 * kStep) {
    even = fma(load(q + c), widen(k + c), even);
    odd = fma(load(q + c + kStep), widen(k + c + kStep), odd);
  }
  T total = sum<T>(even + odd);
  for (; c < C; ++c) total += q[c] * static_cast<T>(k[c]);
  return total;
}

// o += sum over j of weight[j] * v[j], zero weights skipped (their rows may hold anything).
template <class In, int kVecs>
MEGAMF_INLINE void add_columns(const Acc<In>* weight, int64_t count, const In* v, int64_t pitch, Acc<In>* o) {
  using T = Acc<In>;
  Vec<T> acc[kVecs] = {};
  for (int64_t j = 0; j < count; ++j) {
    if (weight[j] == 0) continue;
    const Vec<T> w = splat<T>(weight[j]);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) acc[i] = fma(w, widen(v + j * pitch + i * kLanes<T>), acc[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) store(o + i * kLanes<T>, load(o + i * kLanes<T>) + acc[i]);
}

template <class In>
void add_rows(const Acc<In>* weight, int64_t count, const In* v, int64_t pitch, int64_t C, Acc<In>* o) {
  using T = Acc<In>;
  int64_t c = 0;
  for (; c + 4 * kLanes<T> <= C; c += 4 * kLanes<T>) add_columns<In, 4>(weight, count, v + c, pitch, o + c);
  for (; c + kLanes<T> <= C; c += kLanes<T>) add_columns<In, 1>(weight, count, v + c, pitch, o + c);
  for (; c < C; ++c)
    for (int64_t j = 0; j < count; ++j)
      if (weight[j] != 0) o[c] += weight[j] * static_cast<T>(v[j * pitch + c]);
}

template <class In>
void decode(const at::Tensor& q_BHC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC, const std::vector<int64_t>& start_B,
            const bool* mask_BS, Acc<In> scale, Acc<In> stop, at::Tensor& o_BHC) {
  using T = Acc<In>;
  const int64_t H = q_BHC.size(1), C = q_BHC.size(2), G = k_BGSC.size(1), S = k_BGSC.size(2);
  at::parallel_for(0, q_BHC.size(0) * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> q(C), o(C);
    alignas(64) T z[kChunk], w[kChunk];
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / H, h = n % H, g = h % G;
      const bool* ok = mask_BS ? mask_BS + b * S : nullptr;
      read_row<In, T>(q_BHC.const_data_ptr<In>() + b * q_BHC.stride(0) + h * q_BHC.stride(1), q.data(), C, C, scale);
      const In* keys = k_BGSC.const_data_ptr<In>() + b * k_BGSC.stride(0) + g * k_BGSC.stride(1);
      const In* values = v_BGSC.const_data_ptr<In>() + b * v_BGSC.stride(0) + g * v_BGSC.stride(1);
      std::fill(o.begin(), o.end(), T(0));
      T stick = 1, tail = 0;
      for (int64_t end_key = S; end_key > start_B[b] && !(stick < stop);) {
        const int64_t k0 = std::max(start_B[b], end_key - kChunk), count = end_key - k0;
        for (int64_t j = 0; j < kChunk; ++j) {
          const bool used = j < count && (ok == nullptr || ok[k0 + j]);
          z[j] = used ? dot<In>(q.data(), keys + (k0 + j) * k_BGSC.stride(2), C) : T(0);
        }
        for (int64_t j = 0; j < kChunk; j += kLanes<T>) {
          const Vec<T> one = splat<T>(1);
          const Vec<T> e = exp(clamp<T>(Vec<T>{} - load(z + j), -kMaxExponent<T>, kMaxExponent<T>));
          const Vec<T> share = one / (one + e);
          store(z + j, share);
          store(w + j, e * share);
        }
        for (int64_t j = count - 1; j >= 0; --j) {
          T weight = 0;
          if (ok == nullptr || ok[k0 + j]) {
            // The compensated product of stick.h, one lane.
            weight = (stick + tail) * z[j];
            const T next = stick * w[j], w_low = w[j] >= T(0.5) ? (T(1) - w[j]) - z[j] : T(0);
            tail = std::fma(tail, w[j], std::fma(stick, w_low, std::fma(stick, w[j], -next)));
            stick = next;
          }
          z[j] = weight;
        }
        add_rows<In>(z, count, values + k0 * v_BGSC.stride(2), v_BGSC.stride(2), C, o.data());
        end_key = k0;
      }
      write_row(o.data(), o_BHC.mutable_data_ptr<In>() + b * o_BHC.stride(0) + h * o_BHC.stride(1), C, T(1));
    }
  });
}

}  // namespace

at::Tensor stickbreaking_decode_cpu(const at::Tensor& q_BHC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
                                    const std::optional<at::Tensor>& start_B, const std::optional<at::Tensor>& key_mask_BS,
                                    double scale, double stop) {
  TORCH_CHECK_VALUE(q_BHC.dim() == 3, "q has ", q_BHC.dim(), " dimensions, expected 3 ([B, H, C])");
  check_attention(q_BHC.unsqueeze(2), k_BGSC, v_BGSC, true);
  const int64_t B = q_BHC.size(0), S = k_BGSC.size(2);
  std::vector<int64_t> start(B, 0);
  if (start_B) {
    TORCH_CHECK_VALUE(start_B->dim() == 1 && start_B->size(0) == B, "start_B has shape ", start_B->sizes(), ", expected [", B, "]");
    const at::Tensor wide = start_B->to(at::kLong).contiguous();
    for (int64_t b = 0; b < B; ++b) start[b] = std::clamp<int64_t>(wide.const_data_ptr<int64_t>()[b], 0, S);
  }
  at::Tensor mask;
  if (key_mask_BS) {
    TORCH_CHECK_VALUE(key_mask_BS->dim() == 2 && key_mask_BS->size(0) == B && key_mask_BS->size(1) == S &&
                          key_mask_BS->scalar_type() == at::kBool,
                      "key_mask_BS is ", key_mask_BS->scalar_type(), " of shape ", key_mask_BS->sizes(), ", expected bool [", B, ", ",
                      S, "]");
    mask = key_mask_BS->contiguous();
  }
  at::Tensor o_BHC = at::empty_like(q_BHC);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q_BHC.scalar_type(), "stickbreaking_decode", [&] {
    decode<scalar_t>(q_BHC, k_BGSC, v_BGSC, start, mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
                     static_cast<Acc<scalar_t>>(scale), static_cast<Acc<scalar_t>>(stop), o_BHC);
  });
  return o_BHC;
}

}  // namespace megamf
