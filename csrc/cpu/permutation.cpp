// Rows grouped by expert: counting sort, gather, and the weighted combination. Every output row has one writer.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "heads.h"
#include "ops.h"

namespace megamf {

namespace {

constexpr int64_t kGrain = 64;

void check_order(const at::Tensor& order, int64_t rows, const char* name) {
  TORCH_CHECK_VALUE(order.dim() == 1 && order.size(0) == rows && order.scalar_type() == at::kLong && order.is_contiguous(), name,
                    " is ", order.scalar_type(), " of shape ", order.sizes(), ", expected contiguous int64 [", rows, "]");
}

void check_out(const at::Tensor& out, const at::Tensor& like, int64_t rows) {
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == rows && out.size(1) == like.size(1) && out.scalar_type() == like.scalar_type() &&
                        out.is_contiguous(),
                    "out is ", out.scalar_type(), " of shape ", out.sizes(), ", expected contiguous ", like.scalar_type(), " [", rows,
                    ", ", like.size(1), "]");
}

// An index from outside must not become an address.
int64_t checked(int64_t index, int64_t rows, const char* name) {
  TORCH_CHECK_INDEX(index >= 0 && index < rows, name, " holds ", index, ", expected 0 to ", rows - 1);
  return index;
}

// A result of more bytes than this is gone from the caches before it is read: it is streamed to memory.
constexpr int64_t kStreamed = 8 << 20;

bool streamed(const at::Tensor& out, int64_t row_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  return row_bytes % kLine == 0 && address % kLine == 0 && static_cast<int64_t>(out.nbytes()) > kStreamed;
}

template <bool kStream>
MEGAMF_INLINE void copy_row(const char* from, int64_t bytes, char* to) {
  int64_t at = 0;
  if constexpr (kStream)
    for (; at + kLine <= bytes; at += kLine) stream_line(to + at, from + at);
  else
    std::memcpy(to, from, bytes);
}

template <class T, class In>
MEGAMF_INLINE Vec<T> load_wide(const In* from) {
  if constexpr (std::is_same_v<In, T>) return load(from);
  Vec<T> x;
  for (int i = 0; i < kLanes<T>; ++i) x[i] = static_cast<T>(from[i]);
  return x;
}

template <class T, class Out>
MEGAMF_INLINE void store_narrow(Out* to, Vec<T> x) {
  if constexpr (std::is_same_v<Out, T>) return store(to, x);
  for (int i = 0; i < kLanes<T>; ++i) to[i] = static_cast<Out>(x[i]);
}

// The rows are gathered from everywhere, which the processor cannot foresee: while one is worked on, the next is fetched.
// Channels d to d + kVecs vectors of out = sum_k gate[k] * rows[k], the sum in registers.
template <int kVecs, bool kStream, class T, class In>
MEGAMF_INLINE void combine_channels(const In* const* rows, const In* const* next, const T* gate, int64_t K, int64_t d, In* out) {
  Vec<T> sum[kVecs] = {};
  for (int64_t k = 0; k < K; ++k) {
    const Vec<T> g = splat<T>(gate ? gate[k] : T(1));
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = d + v * kLanes<T>;
      if (at * static_cast<int64_t>(sizeof(In)) % kLine == 0) __builtin_prefetch(next[k] + at);
      sum[v] = fma(g, load_wide<T>(rows[k] + at), sum[v]);
    }
  }
  constexpr int64_t kBytes = kVecs * kLanes<T> * sizeof(In);
  if constexpr (kStream && kBytes % kLine == 0) {
    alignas(kLine) In line[kVecs * kLanes<T>];
    for (int v = 0; v < kVecs; ++v) store_narrow<T>(line + v * kLanes<T>, sum[v]);
    for (int64_t at = 0; at < kBytes; at += kLine)
      stream_line(reinterpret_cast<char*>(out + d) + at, reinterpret_cast<const char*>(line) + at);
  } else {
    for (int v = 0; v < kVecs; ++v) store_narrow<T>(out + d + v * kLanes<T>, sum[v]);
  }
}

template <bool kStream, class T, class In>
void combine_row(const In* const* rows, const In* const* next, const T* gate, int64_t K, int64_t D, In* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes<T> <= D; d += 4 * kLanes<T>) combine_channels<4, kStream>(rows, next, gate, K, d, out);
  for (; d + kLanes<T> <= D; d += kLanes<T>) combine_channels<1, false>(rows, next, gate, K, d, out);
  for (; d < D; ++d) {
    T sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += (gate ? gate[k] : T(1)) * static_cast<T>(rows[k][d]);
    out[d] = static_cast<In>(sum);
  }
}

// grad_y = gate * grad; returns grad . y.
template <class T, class In>
MEGAMF_INLINE T split_row(const In* grad, const In* next, const In* y, T gate, int64_t D, In* grad_y) {
  Vec<T> lanes{};
  const Vec<T> g = splat<T>(gate);
  int64_t d = 0;
  for (; d + kLanes<T> <= D; d += kLanes<T>) {
    __builtin_prefetch(next + d);
    const Vec<T> x = load_wide<T>(grad + d);
    lanes = fma(x, load_wide<T>(y + d), lanes);
    store_narrow<T>(grad_y + d, g * x);
  }
  T total = 0;
  for (; d < D; ++d) {
    total += static_cast<T>(grad[d]) * static_cast<T>(y[d]);
    grad_y[d] = static_cast<In>(gate * static_cast<T>(grad[d]));
  }
  return total + sum<T>(lanes);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert_cpu(const at::Tensor& expert_NK, int64_t num_experts) {
  TORCH_CHECK_VALUE(expert_NK.dim() == 2 && expert_NK.scalar_type() == at::kLong, "expert_NK is ", expert_NK.scalar_type(),
                    " of shape ", expert_NK.sizes(), ", expected int64 [N, K]");
  const at::Tensor expert = expert_NK.contiguous();
  const int64_t R = expert.numel();
  at::Tensor order_R = at::empty({R}, expert.options()), inverse_R = at::empty({R}, expert.options());
  at::Tensor count_E = at::zeros({num_experts}, expert.options());
  const int64_t* e = expert.const_data_ptr<int64_t>();
  int64_t *order = order_R.mutable_data_ptr<int64_t>(), *inverse = inverse_R.mutable_data_ptr<int64_t>(),
          *count = count_E.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < R; ++n) ++count[checked(e[n], num_experts, "expert_NK")];
  std::vector<int64_t> next(num_experts);
  int64_t total = 0;
  for (int64_t x = 0; x < num_experts; ++x) {
    next[x] = total;
    total += count[x];
  }
  for (int64_t n = 0; n < R; ++n) {
    const int64_t r = next[e[n]]++;
    order[r] = n;
    inverse[n] = r;
  }
  return {order_R, inverse_R, count_E};
}

// out[r] = x[order[r] / top_k]
void permute_into_cpu(const at::Tensor& x_ND, const at::Tensor& order_R, const at::Tensor& inverse_R, int64_t top_k,
                            const at::Tensor& out_RD) {
  TORCH_CHECK_VALUE(x_ND.dim() == 2 && top_k > 0, "x has ", x_ND.dim(), " dimensions and top_k is ", top_k, ", expected 2 and >= 1");
  const int64_t N = x_ND.size(0), D = x_ND.size(1), R = N * top_k;
  check_order(order_R, R, "order_R");
  check_order(inverse_R, R, "inverse_R");  // the backward pass gathers with it
  check_out(out_RD, x_ND, R);
  const at::Tensor x = x_ND.contiguous();
  const int64_t *order = order_R.const_data_ptr<int64_t>(), *inverse = inverse_R.const_data_ptr<int64_t>();
  const int64_t bytes = D * x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out_RD.mutable_data_ptr());
  // Token by token: each row is read once, in the order of memory, and its copies are written where they belong.
  const auto scatter = [&](auto stream, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t nk = n * top_k; nk < (n + 1) * top_k; ++nk) {
        const int64_t r = checked(inverse[nk], R, "inverse_R");
        // For every nk: so the rows r are all different, and none is left out.
        TORCH_CHECK_INDEX(order[r] == nk, "order_R holds ", order[r], " at ", r, ", where inverse_R puts ", nk);
        copy_row<decltype(stream)::value>(from + n * bytes, bytes, to + r * bytes);
      }
    if constexpr (decltype(stream)::value) stream_end();
  };
  const bool past_caches = streamed(out_RD, bytes);
  at::parallel_for(0, N, kGrain, [&](int64_t begin, int64_t end) {
    past_caches ? scatter(std::true_type{}, begin, end) : scatter(std::false_type{}, begin, end);
  });
}

at::Tensor permute_cpu(const at::Tensor& x_ND, const at::Tensor& order_R, const at::Tensor& inverse_R, int64_t top_k) {
  const bool fits = x_ND.dim() == 2 && top_k > 0;
  at::Tensor out_RD = at::empty({fits ? x_ND.size(0) * top_k : 0, fits ? x_ND.size(1) : 0}, x_ND.options());
  permute_into_cpu(x_ND, order_R, inverse_R, top_k, out_RD);
  return out_RD;
}

// out[n] = sum_k gate[n, k] * y[inverse[n * K + k]]; without a gate the plain sum.
void unpermute_into_cpu(const at::Tensor& y_RD, const at::Tensor& order_R, const at::Tensor& inverse_R,
                              const std::optional<at::Tensor>& gate_NK, int64_t top_k, const at::Tensor& out_ND) {
  TORCH_CHECK_VALUE(y_RD.dim() == 2 && top_k > 0 && y_RD.size(0) % top_k == 0, "y has shape ", y_RD.sizes(), " and top_k is ", top_k,
                    ", expected [N * top_k, D]");
  const int64_t R = y_RD.size(0), D = y_RD.size(1), N = R / top_k;
  check_order(inverse_R, R, "inverse_R");
  check_order(order_R, R, "order_R");  // the backward pass gathers with it
  check_out(out_ND, y_RD, N);
  const at::Tensor y = y_RD.contiguous();
  const int64_t* inverse = inverse_R.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, y.scalar_type(), "unpermute", [&] {
    using T = Acc<scalar_t>;
    at::Tensor gate;
    if (gate_NK) {
      TORCH_CHECK_VALUE(gate_NK->dim() == 2 && gate_NK->size(0) == N && gate_NK->size(1) == top_k, "gate has shape ",
                        gate_NK->sizes(), ", expected [", N, ", ", top_k, "]");
      gate = gate_NK->to(c10::CppTypeToScalarType<T>::value).contiguous();
    }
    const T* weight = gate.defined() ? gate.const_data_ptr<T>() : nullptr;
    const scalar_t* from = y.const_data_ptr<scalar_t>();
    scalar_t* to = out_ND.mutable_data_ptr<scalar_t>();
    const auto gather = [&](auto stream, int64_t begin, int64_t end) {
      constexpr bool kStream = decltype(stream)::value;
      std::vector<const scalar_t*> now(top_k), next(top_k);
      const auto find = [&](int64_t n) {
        for (int64_t k = 0; k < top_k; ++k) next[k] = from + checked(inverse[n * top_k + k], R, "inverse_R") * D;
      };
      if (begin < end) find(begin);
      for (int64_t n = begin; n < end; ++n) {
        now = next;
        if (n + 1 < end) find(n + 1);
        combine_row<kStream>(now.data(), next.data(), weight ? weight + n * top_k : nullptr, top_k, D, to + n * D);
      }
      if constexpr (kStream) stream_end();
    };
    const bool past_caches = streamed(out_ND, D * sizeof(scalar_t));
    at::parallel_for(0, N, kGrain, [&](int64_t begin, int64_t end) {
      past_caches ? gather(std::true_type{}, begin, end) : gather(std::false_type{}, begin, end);
    });
  });
}

at::Tensor unpermute_cpu(const at::Tensor& y_RD, const at::Tensor& order_R, const at::Tensor& inverse_R,
                         const std::optional<at::Tensor>& gate_NK, int64_t top_k) {
  const bool fits = y_RD.dim() == 2 && top_k > 0;
  at::Tensor out_ND = at::empty({fits ? y_RD.size(0) / top_k : 0, fits ? y_RD.size(1) : 0}, y_RD.options());
  unpermute_into_cpu(y_RD, order_R, inverse_R, gate_NK, top_k, out_ND);
  return out_ND;
}

// Gradients of unpermute: grad_y[r] = gate[n, k] * grad[n] with n * K + k = order[r], grad_gate[n, k] = grad[n] . y[r].
std::tuple<at::Tensor, at::Tensor> unpermute_backward_cpu(const at::Tensor& grad_ND, const at::Tensor& y_RD,
                                                          const at::Tensor& order_R, const at::Tensor& gate_NK) {
  const int64_t R = y_RD.size(0), D = y_RD.size(1), K = gate_NK.size(1);
  TORCH_CHECK_VALUE(grad_ND.dim() == 2 && grad_ND.size(1) == D && grad_ND.size(0) * K == R, "grad has shape ", grad_ND.sizes(),
                    ", expected [", K > 0 ? R / K : 0, ", ", D, "]");
  check_order(order_R, R, "order_R");
  const at::Tensor grad = grad_ND.contiguous(), y = y_RD.contiguous();
  at::Tensor grad_y = at::empty_like(y);
  at::Tensor grad_gate;
  const int64_t* order = order_R.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, y.scalar_type(), "unpermute_backward", [&] {
    using T = Acc<scalar_t>;
    const at::Tensor gate = gate_NK.to(c10::CppTypeToScalarType<T>::value).contiguous();
    grad_gate = at::empty_like(gate);
    const T* weight = gate.const_data_ptr<T>();
    const scalar_t *up = grad.const_data_ptr<scalar_t>(), *rows = y.const_data_ptr<scalar_t>();
    scalar_t* down = grad_y.mutable_data_ptr<scalar_t>();
    T* to_gate = grad_gate.mutable_data_ptr<T>();
    at::parallel_for(0, R, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t nk = checked(order[r], R, "order_R"), ahead = r + 1 < end ? checked(order[r + 1], R, "order_R") : nk;
        to_gate[nk] = split_row(up + nk / K * D, up + ahead / K * D, rows + r * D, weight[nk], D, down + r * D);
      }
    });
  });
  return {grad_y, grad_gate.to(gate_NK.scalar_type())};
}

}  // namespace megamf
