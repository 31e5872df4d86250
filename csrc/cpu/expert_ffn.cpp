// Feed-forward layers whose neurons are shared out to small experts (32 neurons, say), of which a token uses many: one
// pass that gathers, multiplies, activates and adds up, where rows by expert would be copied top-k times.
//
// Tokens are taken in blocks that stay in the caches. Within one, the tokens of an expert are found by a counting sort;
// products read the tokens' rows and add to the results' rows where they stand. Experts follow each other in ascending
// order in every sum, whatever the number of threads: results do not depend on it.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "ops.h"
#include "vec.h"

namespace megamf {

namespace {

// Tokens of a block: its rows of x and y stay in L2 beside the matrices of an expert.
constexpr int64_t kTokens = 128;
// Rows and vectors of a small product: 12 x 2 accumulators, 2 rows of B and a broadcast fill 32 registers.
constexpr int kRows = kVecBytes == 64 ? 12 : 5;
constexpr int kVecs = 2;
// Depth of one pass over B: 192 x 32 floats stay in L1.
constexpr int64_t kDepth = 192;

enum class Activation { kRelu, kRelu2, kSilu, kGelu, kGeluNew };

Activation activation_of(std::string_view name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "relu2") return Activation::kRelu2;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new") return Activation::kGeluNew;
  TORCH_CHECK_VALUE(false, "activation is ", name, ", expected relu, relu2, silu, gelu or gelu_new");
}

template <class T>
MEGAMF_INLINE T activate(Activation kind, T x) {
  switch (kind) {
    case Activation::kRelu:
      return x > 0 ? x : T(0);
    case Activation::kRelu2:
      return x > 0 ? x * x : T(0);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return T(0.5) * x * (1 + std::erf(x * T(0.70710678118654752440)));
    case Activation::kGeluNew:
      return T(0.5) * x * (1 + std::tanh(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x)));
  }
  return x;
}

// c[r][0:n] (+)= sum over d in [d0, d1) of a[r][d] b[d][0:n], rows of a and c anywhere.
template <class T, int kR, int kV>
MEGAMF_INLINE void micro_rows(const T* const* a, const T* b, int64_t ldb, T* const* c, int64_t col, int64_t d0, int64_t d1,
                              bool add) {
  Vec<T> acc[kR][kV];
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) acc[r][v] = Vec<T>{};
  }
  const T* rows[kR];
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) rows[r] = a[r];
  for (int64_t d = d0; d < d1; ++d) {
    Vec<T> line[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) line[v] = load(b + d * ldb + col + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r) {
      const Vec<T> x = splat<T>(rows[r][d]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[r][v] = fma(x, line[v], acc[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      T* cell = c[r] + col + v * kLanes<T>;
      store(cell, add ? load(cell) + acc[r][v] : acc[r][v]);
    }
  }
}

template <class T, int kV>
void strip(const T* const* a, int64_t m, const T* b, int64_t ldb, T* const* c, int64_t col, int64_t d0, int64_t d1, bool add) {
  int64_t r = 0;
  for (; r + kRows <= m; r += kRows) micro_rows<T, kRows, kV>(a + r, b, ldb, c + r, col, d0, d1, add);
  for (; r + 4 <= m; r += 4) micro_rows<T, 4, kV>(a + r, b, ldb, c + r, col, d0, d1, add);
  for (; r < m; ++r) micro_rows<T, 1, kV>(a + r, b, ldb, c + r, col, d0, d1, add);
}

// c[r][begin:end] (+)= a[r][0:k] b[:, begin:end] for m rows; whole vectors of columns.
template <class T>
void product(const T* const* a, int64_t m, int64_t k, const T* b, int64_t ldb, T* const* c, int64_t begin, int64_t end, bool add) {
  for (int64_t d0 = 0; d0 < k; d0 += kDepth) {
    const int64_t d1 = std::min(k, d0 + kDepth);
    int64_t col = begin;
    // Of one row the accumulators of two vectors would wait for each other.
    if (m == 1)
      for (; col + 8 * kLanes<T> <= end; col += 8 * kLanes<T>) micro_rows<T, 1, 8>(a, b, ldb, c, col, d0, d1, add || d0 > 0);
    for (; col + kVecs * kLanes<T> <= end; col += kVecs * kLanes<T>) strip<T, kVecs>(a, m, b, ldb, c, col, d0, d1, add || d0 > 0);
    for (; col < end; col += kLanes<T>) strip<T, 1>(a, m, b, ldb, c, col, d0, d1, add || d0 > 0);
  }
}

template <class T>
struct Layer {
  int64_t N, D, E, F, O, K;
  Activation activation;
  const T *gate, *up, *out, *gate_bias, *up_bias, *out_bias, *weight;  // those that there are
};

// The tokens of a block by expert: copy[first[e]] .. copy[first[e + 1] - 1] are the n * K + k of expert e.
struct Sorted {
  std::vector<int64_t> first, copy;
};

Sorted sort_block(const int64_t* expert, int64_t begin, int64_t end, int64_t E) {
  Sorted s{std::vector<int64_t>(E + 1), std::vector<int64_t>(end - begin)};
  for (int64_t i = begin; i < end; ++i) {
    TORCH_CHECK_INDEX(expert[i] >= 0 && expert[i] < E, "expert_NK holds ", expert[i], ", expected 0 to ", E - 1);
    ++s.first[expert[i] + 1];
  }
  for (int64_t e = 0; e < E; ++e) s.first[e + 1] += s.first[e];
  std::vector<int64_t> next(s.first.begin(), s.first.end() - 1);
  for (int64_t i = begin; i < end; ++i) s.copy[next[expert[i]]++] = i;
  return s;
}

// h[i] = act(W1_e x + b) (* (U_e x + c)) (* weight) for rows [from, to) of the sorted copies, all of expert e.
template <class T>
void hidden_rows(const Layer<T>& l, const T* x, const Sorted& s, int64_t e, T* h, std::vector<T>& other) {
  const int64_t from = s.first[e], m = s.first[e + 1] - from;
  if (!m) return;
  std::vector<const T*> rows(m);
  std::vector<T*> to(m), to_up(m);
  if (l.up) other.resize(m * l.F);
  for (int64_t r = 0; r < m; ++r) {
    rows[r] = x + s.copy[from + r] / l.K * l.D;
    to[r] = h + (from + r) * l.F;
    to_up[r] = other.data() + r * l.F;
  }
  product(rows.data(), m, l.D, l.gate + e * l.D * l.F, l.F, to.data(), 0, l.F, false);
  if (l.up) product(rows.data(), m, l.D, l.up + e * l.D * l.F, l.F, to_up.data(), 0, l.F, false);
  for (int64_t r = 0; r < m; ++r) {
    const T w = l.weight ? l.weight[s.copy[from + r]] : T(1);
    T *row = to[r], *up = to_up[r];
    for (int64_t f = 0; f < l.F; ++f) row[f] = activate(l.activation, l.gate_bias ? row[f] + l.gate_bias[e * l.F + f] : row[f]);
    if (l.up)
      for (int64_t f = 0; f < l.F; ++f) row[f] *= l.up_bias ? up[f] + l.up_bias[e * l.F + f] : up[f];
    if (l.weight)
      for (int64_t f = 0; f < l.F; ++f) row[f] *= w;
  }
}

// Columns [begin, end) of y for the tokens of a block: the bias, then expert after expert.
template <class T>
void output_columns(const Layer<T>& l, const Sorted& s, const T* h, T* y, int64_t first, int64_t last, int64_t begin, int64_t end) {
  for (int64_t n = first; n < last; ++n)
    for (int64_t o = begin; o < end; ++o) y[n * l.O + o] = l.out_bias ? l.out_bias[o] : T(0);
  std::vector<const T*> rows;
  std::vector<T*> to;
  for (int64_t e = 0; e < l.E; ++e) {
    const int64_t from = s.first[e], m = s.first[e + 1] - from;
    if (!m) continue;
    rows.resize(m);
    to.resize(m);
    for (int64_t r = 0; r < m; ++r) {
      rows[r] = h + (from + r) * l.F;
      to[r] = y + s.copy[from + r] / l.K * l.O;
    }
    product(rows.data(), m, l.F, l.out + e * l.F * l.O, l.O, to.data(), begin, end, true);
  }
}

template <class T>
void expert_ffn(const Layer<T>& l, const T* x, const int64_t* expert, T* y) {
  const int64_t threads = at::get_num_threads();
  if (l.N >= threads * kTokens / 4 || threads == 1) {
    const int64_t size = std::min<int64_t>(kTokens, (l.N + threads - 1) / threads), blocks = (l.N + size - 1) / size;
    at::parallel_for(0, blocks, 1, [&](int64_t b0, int64_t b1) {
      std::vector<T> h(size * l.K * l.F), other;
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t first = b * size, last = std::min(l.N, first + size);
        const Sorted s = sort_block(expert, first * l.K, last * l.K, l.E);
        for (int64_t e = 0; e < l.E; ++e) hidden_rows(l, x, s, e, h.data(), other);
        output_columns(l, s, h.data(), y, first, last, 0, l.O);
      }
    });
    return;
  }
  // A few tokens: the threads share the experts, then the columns of the result.
  const Sorted s = sort_block(expert, 0, l.N * l.K, l.E);
  std::vector<T> h(l.N * l.K * l.F);
  std::vector<int64_t> used;
  for (int64_t e = 0; e < l.E; ++e)
    if (s.first[e + 1] > s.first[e]) used.push_back(e);
  at::parallel_for(0, static_cast<int64_t>(used.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> other;
    for (int64_t u = begin; u < end; ++u) hidden_rows(l, x, s, used[u], h.data(), other);
  });
  const int64_t strips = l.O / kLanes<T>, grain = std::max<int64_t>(1, (strips + threads - 1) / threads);
  at::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    output_columns(l, s, h.data(), y, 0, l.N, begin * kLanes<T>, end * kLanes<T>);
  });
}

}  // namespace

at::Tensor expert_ffn_cpu(const at::Tensor& x_ND, const at::Tensor& expert_NK, const at::Tensor& gate_EDF,
                          const std::optional<at::Tensor>& up_EDF, const at::Tensor& out_EFO,
                          const std::optional<at::Tensor>& gate_bias_EF, const std::optional<at::Tensor>& up_bias_EF,
                          const std::optional<at::Tensor>& out_bias_O, const std::optional<at::Tensor>& weight_NK,
                          std::string_view activation) {
  TORCH_CHECK_VALUE(x_ND.dim() == 2 && gate_EDF.dim() == 3 && out_EFO.dim() == 3 && expert_NK.dim() == 2, "x is ", x_ND.sizes(),
                    ", experts ", expert_NK.sizes(), ", gate ", gate_EDF.sizes(), " and out ", out_EFO.sizes(),
                    ", expected [N, D], [N, K], [E, D, F] and [E, F, O]");
  const int64_t N = x_ND.size(0), D = x_ND.size(1), E = gate_EDF.size(0), F = gate_EDF.size(2), O = out_EFO.size(2),
                K = expert_NK.size(1);
  const auto fits = [&](const std::optional<at::Tensor>& t, at::IntArrayRef shape, const char* name) {
    TORCH_CHECK_VALUE(!t || (t->sizes() == shape && t->scalar_type() == x_ND.scalar_type()), name, " is ", t->scalar_type(), " ",
                      t->sizes(), ", expected ", x_ND.scalar_type(), " ", shape);
    return t ? t->contiguous() : at::Tensor();
  };
  const at::Tensor x = x_ND.contiguous(), expert = expert_NK.contiguous();
  TORCH_CHECK_VALUE(expert.scalar_type() == at::kLong && expert.size(0) == N && K > 0, "expert_NK is ", expert.scalar_type(), " ",
                    expert.sizes(), ", expected int64 [", N, ", 1 or more]");
  const at::Tensor gate = fits(gate_EDF, {E, D, F}, "gate"), up = fits(up_EDF, {E, D, F}, "up"), out = fits(out_EFO, {E, F, O}, "out"),
                   gate_bias = fits(gate_bias_EF, {E, F}, "gate_bias"), up_bias = fits(up_bias_EF, {E, F}, "up_bias"),
                   out_bias = fits(out_bias_O, {O}, "out_bias"), weight = fits(weight_NK, {N, K}, "weight");
  at::Tensor y_NO = at::empty({N, O}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "expert_ffn", [&] {
    using T = scalar_t;
    TORCH_CHECK_VALUE(F % kLanes<T> == 0 && O % kLanes<T> == 0, "experts of ", F, " neurons and ", O,
                      " outputs: expected multiples of ", kLanes<T>);
    const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
    const Layer<T> l{N,         D,        E,         F,         O,             K,             activation_of(activation),
                     data(gate), data(up), data(out), data(gate_bias), data(up_bias), data(out_bias), data(weight)};
    if (N) expert_ffn(l, x.const_data_ptr<T>(), expert.const_data_ptr<int64_t>(), y_NO.mutable_data_ptr<T>());
  });
  return y_NO;
}

}  // namespace megamf
