// The stick-breaking recurrence on one tile of transposed logits [keys, queries], keys walked from the newest to the
// oldest, one vector register of queries at a time.
//
// With z = sigmoid(l) the weight of key j is A_j = z_j * stick_j, and stick_{j-1} = stick_j * (1 - z_j). The stick is
// carried as an unevaluated sum stick + tail (the rounding errors of 1 - z and of the product go to the tail), so that
// thousands of tiny z neither vanish nor drift: relative error of a few ulp at any length, and one exponential an
// element. (A running fp32 sum of log(1 - z), exponentiated, is off by ulp(|sum|) and costs two more transcendentals.)
//
// Gradient: with g_j = dO.v_j and t_j = A_j g_j,  dl_j = (1 - z_j) t_j - z_j * sum_{m<j} t_m.  The prefix sum runs from the oldest key
// up, so the walk down keeps the weights and shares of a strip of keys x 64 queries, and a walk up finishes. (The
// prefix as a difference, dO.o minus the newer terms, would need no strip, and costs a factor of 5 to 50 in accuracy.) The logarithm of what is left adds
// -z_j times its gradient to dl_j: the prefix sum starts from it.
#pragma once

#include "vec.h"

namespace megamf {

constexpr int64_t kTileQueries = 64;
constexpr int64_t kTileKeys = 64;

// State of the queries of one tile column. Query i sees the keys first[i] <= j <= last[i].
template <class T>
struct alignas(64) Rows {
  T stick[kTileQueries];
  T tail[kTileQueries];
  T prefix[kTileQueries];  // backward: sum of t over the keys already passed on the way up, from the gradient of log_rem on
  T log_rem[kTileQueries];  // sum of log(1 - z), where it is asked for; what rounding took from it
  T log_rem_low[kTileQueries];
  LaneInt<T> first[kTileQueries];
  LaneInt<T> last[kTileQueries];
};

template <class T>
struct Break {
  Vec<T> weight;
  Vec<T> share;  // z when z <= 1/2, else -(1 - z): both exact to an ulp; 0 exactly when the key is not seen
};

// One key for kLanes queries: breaks the stick.
template <class T>
MEGAMF_INLINE Break<T> break_stick(Vec<T> logit, bool masked, IntVec<T> seen, Vec<T>& stick, Vec<T>& tail) {
  const Vec<T> zero{}, one = splat<T>(1), half = splat<T>(T(0.5));
  const Vec<T> e = exp(clamp<T>(zero - logit, -kMaxExponent<T>, kMaxExponent<T>));
  Vec<T> z = one / (one + e);
  Vec<T> w = e * z;  // 1 - z
  if (masked) {
    z = seen ? z : zero;
    w = seen ? w : one;
  }
  // For w >= 1/2 the subtraction is exact and yields what rounding took from w; for smaller w the error is relative.
  const Vec<T> w_low = w >= half ? (one - w) - z : zero;
  Break<T> out;
  out.share = w < half ? zero - w : z;
  out.weight = (stick + tail) * z;
  const Vec<T> next = stick * w;
  Vec<T> error = fma(stick, w, zero - next);
  error = fma(stick, w_low, error);
  tail = fma(tail, w, error);
  stick = next;
  return out;
}

// log(1 - sigmoid(l)) = -(max(l, 0) + log(1 + e^-|l|)) for any finite l: log(stick) would end where the stick underflows.
template <class T>
MEGAMF_INLINE Vec<T> log_left(Vec<T> logit) {
  const Vec<T> zero{}, above = logit > zero ? logit : zero;
  const Vec<T> u = exp(clamp<T>(logit - above - above, -kMaxExponent<T>, T(0)));  // (l - 2 max(l, 0)) = -|l|
  return zero - above - log1p_unit<T>(u);
}

// sum + low += x: thousands of keys must not lose digits to rounding (two-sum).
template <class T>
MEGAMF_INLINE void add_exactly(Vec<T> x, Vec<T>& sum, Vec<T>& low) {
  const Vec<T> next = sum + x, part = next - sum;
  low += (sum - (next - part)) + (x - part);
  sum = next;
}

template <class T>
MEGAMF_INLINE IntVec<T> seen_lanes(int64_t key, const uint8_t* key_ok, int64_t j, IntVec<T> first, IntVec<T> last) {
  const IntVec<T> at = static_cast<LaneInt<T>>(key) + IntVec<T>{};
  const IntVec<T> ok = (key_ok == nullptr || key_ok[j]) ? ~IntVec<T>{} : IntVec<T>{};
  return (at >= first) & (at <= last) & ok;
}

// tile[j, i], i < lanes: logits in, weights out; row j is key k0 + j; key_ok[j] (may be null) is false for masked keys.
// kShares: the shares, as in Break, go to share[j, i]. kRest: rows.log_rem is kept.
template <class T, bool kMasked, bool kShares, bool kRest>
void walk_down(T* tile, T* share, int64_t lanes, int64_t keys, int64_t k0, const uint8_t* key_ok, Rows<T>& rows) {
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    Vec<T> stick = load(rows.stick + i), tail = load(rows.tail + i);
    Vec<T> log_rem = load(rows.log_rem + i), log_rem_low = load(rows.log_rem_low + i);
    const IntVec<T> first = load_int<T>(rows.first + i), last = load_int<T>(rows.last + i);
    for (int64_t j = keys - 1; j >= 0; --j) {
      const int64_t at = j * kTileQueries + i;
      IntVec<T> seen{};
      if (kMasked) seen = seen_lanes<T>(k0 + j, key_ok, j, first, last);
      const Vec<T> logit = load(tile + at);
      const Break<T> b = break_stick<T>(logit, kMasked, seen, stick, tail);
      if (kRest) {
        const Vec<T> left = log_left<T>(logit);
        add_exactly<T>(!kMasked ? left : seen ? left : Vec<T>{}, log_rem, log_rem_low);
      }
      store(tile + at, b.weight);
      if (kShares) store(share + at, b.share);
    }
    store(rows.stick + i, stick);
    store(rows.tail + i, tail);
    if (kRest) {
      store(rows.log_rem + i, log_rem);
      store(rows.log_rem_low + i, log_rem_low);
    }
  }
}

// grad: dO.v in, gradient of the logits out. Unseen cells may hold anything, NaN included.
template <class T>
void walk_up(const T* weight, const T* share, T* grad, int64_t lanes, int64_t keys, Rows<T>& rows) {
  const Vec<T> zero{}, one = splat<T>(1);
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    Vec<T> prefix = load(rows.prefix + i);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kTileQueries + i;
      const Vec<T> s = load(share + at), term = s != zero ? load(weight + at) * load(grad + at) : zero;
      const Vec<T> small = s < zero ? zero - s : s, large = one - small;
      const Vec<T> z = s < zero ? large : small, w = s < zero ? small : large;
      store(grad + at, fma(zero - z, prefix, w * term));
      prefix += term;
    }
    store(rows.prefix + i, prefix);
  }
}

// Whether every stick of the tile is used up to `stop` (0: never).
template <class T>
bool exhausted(const Rows<T>& rows, T stop) {
  for (int64_t i = 0; i < kTileQueries; ++i)
    if (!(rows.stick[i] < stop)) return false;  // a NaN is never used up
  return true;
}

}  // namespace megamf
