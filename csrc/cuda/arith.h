// Arithmetic that the CUDA kernels share, free of CUDA: the break of a stick, what remains of it, who sees what, where
// things lie. A plain C++ compiler builds it too, which is how it is tested without a GPU.
//
// A query with logits l walks its keys from the newest to the oldest. Key j takes the share z_j = sigmoid(l_j) of the stick
// that is left: A_j = z_j * exp(sum over newer m of log(1 - z_m)). The logarithms are summed, never subtracted.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MEGAMF_HD __host__ __device__ __forceinline__
#else
#define MEGAMF_HD inline
#endif

namespace megamf::cuda {

constexpr int kGroup = 8;                   // consecutive elements of a lane: 16 bytes of a 16-bit type
constexpr int kLanes = 32;
constexpr int kTileKeys = kGroup * kLanes;  // keys that a warp takes at a time

MEGAMF_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hardware exponential and logarithm, base 2.
MEGAMF_HD float fast_exp2(float x) { return exp2f(x); }
MEGAMF_HD float fast_log2(float x) {
#ifdef __CUDA_ARCH__
  return __log2f(x);
#else
  return std::log2(x);
#endif
}

// One key's break: the share taken, what it leaves, and the logarithm of what it leaves. kExact: natural logarithms, errors of
// a few ulp; otherwise base 2 and errors below 2^-15 of a term, for results of 16 bits.
struct Share {
  float taken, left, log_taken, log_left;
};

template <bool kExact>
MEGAMF_HD Share break_at(float logit) {
  Share out;
  if constexpr (kExact) {
    const float t = expf(-fabsf(logit)), big = 1.0f / (1.0f + t), small = t * big, log_big = log1pf(t);
    out.taken = logit >= 0 ? big : small;
    out.left = logit >= 0 ? small : big;
    out.log_taken = fminf(logit, 0.0f) - log_big;
    out.log_left = -(fmaxf(logit, 0.0f) + log_big);
  } else {
    const float l = logit * 1.44269504f, t = fast_exp2(-fabsf(l)), big = 1.0f / (1.0f + t), small = t * big;
    // Near 1 the hardware's logarithm has no relative accuracy, and thousands of tiny shares must not vanish.
    const float series = t * (1.44269504f + t * (-0.72134752f + t * (0.48089835f + t * -0.36067376f)));
    const float log_big = t < 0.015625f ? series : fast_log2(1.0f + t);
    out.taken = logit >= 0 ? big : small;
    out.left = logit >= 0 ? small : big;
    out.log_taken = fminf(l, 0.0f) - log_big;
    out.log_left = -(fmaxf(l, 0.0f) + log_big);
  }
  return out;
}

// The stick whose logarithm (in the unit of break_at) is given.
template <bool kExact>
MEGAMF_HD float stick(float log_stick) {
  return kExact ? expf(log_stick) : fast_exp2(log_stick);
}

// A natural logarithm in the unit of break_at.
template <bool kExact>
MEGAMF_HD float unit(float natural_log) {
  return kExact ? natural_log : natural_log * 1.44269504f;
}

// The weight of a key in front of which a stick of this logarithm is left.
template <bool kExact>
MEGAMF_HD float weight_of(const Share& share, float log_stick) {
  return kExact ? share.taken * expf(log_stick) : fast_exp2(share.log_taken + log_stick);
}

// Gradient of the logit: weight and grad are those of the key, older = sum of weight * grad over the older keys.
MEGAMF_HD float logit_grad(const Share& share, float term, float older) { return share.left * term - share.taken * older; }

// Keys first <= j <= last that a query may see.
struct Visible {
  int64_t first, last;
  MEGAMF_HD bool any(int64_t j, int64_t count) const { return first <= last && j <= last && j + count > first; }
  MEGAMF_HD bool operator()(int64_t j) const { return first <= j && j <= last; }
};

// Rows of logits in the order [batch, key head, query, head of the group]: `heads` rows belong to one query.
struct RowIndex {
  int64_t batch, query;
  MEGAMF_HD RowIndex(int64_t row, int64_t rows_a_batch, int64_t heads, int64_t T)
      : batch(row / rows_a_batch), query(row / heads % T) {}
};

// A row of S elements lies in groups of kGroup that start at aligned addresses; its first element is the `shift`-th of group 0.
struct RowGroups {
  int64_t S, shift;
  MEGAMF_HD RowGroups(int64_t row, int64_t S, int64_t base) : S(S), shift((base + row % kGroup * (S % kGroup)) % kGroup) {}
  MEGAMF_HD int64_t count() const { return (S + shift + kGroup - 1) / kGroup; }
  MEGAMF_HD int64_t first(int64_t group) const { return group * kGroup - shift; }
  MEGAMF_HD bool whole(int64_t j) const { return j >= 0 && j + kGroup <= S; }
};

// Part `part` of `parts` of the keys [0, S), the newest first: [begin, end).
struct KeyRange {
  int64_t begin, end;
  MEGAMF_HD KeyRange(int64_t S, int64_t part, int64_t parts, int64_t tile) {
    const int64_t size = ceil_div(ceil_div(S, parts), tile) * tile;
    end = S - part * size;
    begin = end - size;
    end = end < 0 ? 0 : end;
    begin = begin < 0 ? 0 : begin;
  }
};

}  // namespace megamf::cuda
