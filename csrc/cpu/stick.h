// The stick-breaking recurrence on one tile of transposed logits [keys, queries], keys walked from the newest to the
// oldest, one vector register of queries at a time.
//
// With z = sigmoid(l) the weight of key j is A_j = z_j * stick_j, and stick_{j-1} = stick_j * (1 - z_j). The stick is
// carried as an unevaluated sum stick + tail (the rounding errors of 1 - z and of the product go to the tail), so that
// thousands of tiny z neither vanish nor drift: relative error of a few ulp at any length, and one exponential an
// element. (A running fp32 sum of log(1 - z), exponentiated, is off by ulp(|sum|) and costs two more transcendentals.)
//
// Gradient: with g_j = dO.v_j, t_j = A_j g_j and D = sum_m t_m = dO.o,
//   dl_j = t_j - z_j * sum_{m<=j} t_m,   sum_{m<=j} t_m = D - sum_{m>j} t_m,
// so the same walk serves; what remains of D is a difference and carries noise of ulp(D). It is multiplied by z, and z
// sums to at most -log(floor) over keys whose stick is above `floor`, so taking it as zero below keeps the noise bounded.
#pragma once

#include "vec.h"

namespace megamf {

constexpr int64_t kTileQueries = 64;
constexpr int64_t kTileKeys = 64;

template <class T>
constexpr T kStickFloor = sizeof(T) == 4 ? T(1.0 / (1 << 30)) : T(1.0 / (1ll << 60));

// State of the queries of one tile column. Query i sees the keys first[i] <= j <= last[i].
template <class T>
struct alignas(64) Rows {
  T stick[kTileQueries];
  T tail[kTileQueries];
  T rest[kTileQueries];  // backward: D minus the terms of the keys already passed
  LaneInt<T> first[kTileQueries];
  LaneInt<T> last[kTileQueries];
};

template <class T>
struct Break {
  Vec<T> weight, z, stick_before;
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
  out.z = z;
  out.stick_before = stick;
  out.weight = (stick + tail) * z;
  const Vec<T> next = stick * w;
  Vec<T> error = fma(stick, w, zero - next);
  error = fma(stick, w_low, error);
  tail = fma(tail, w, error);
  stick = next;
  return out;
}

template <class T>
MEGAMF_INLINE IntVec<T> seen_lanes(int64_t key, const uint8_t* key_ok, int64_t j, IntVec<T> first, IntVec<T> last) {
  const IntVec<T> at = static_cast<LaneInt<T>>(key) + IntVec<T>{};
  const IntVec<T> ok = (key_ok == nullptr || key_ok[j]) ? ~IntVec<T>{} : IntVec<T>{};
  return (at >= first) & (at <= last) & ok;
}

// tile[j, i]: logits in, weights out; row j is key k0 + j; key_ok[j] (may be null) is false for masked keys.
template <class T, bool kMasked>
void stick_forward(T* tile, int64_t keys, int64_t k0, const uint8_t* key_ok, Rows<T>& rows) {
  for (int64_t i = 0; i < kTileQueries; i += kLanes<T>) {
    Vec<T> stick = load(rows.stick + i), tail = load(rows.tail + i);
    const IntVec<T> first = load_int<T>(rows.first + i), last = load_int<T>(rows.last + i);
    for (int64_t j = keys - 1; j >= 0; --j) {
      T* cell = tile + j * kTileQueries + i;
      IntVec<T> seen{};
      if (kMasked) seen = seen_lanes<T>(k0 + j, key_ok, j, first, last);
      store(cell, break_stick<T>(load(cell), kMasked, seen, stick, tail).weight);
    }
    store(rows.stick + i, stick);
    store(rows.tail + i, tail);
  }
}

// tile: logits in, weights out; grad: dO.v in, gradient of the logits out.
template <class T, bool kMasked>
void stick_backward(T* tile, T* grad, int64_t keys, int64_t k0, const uint8_t* key_ok, Rows<T>& rows) {
  const Vec<T> zero{}, floor = splat<T>(kStickFloor<T>);
  for (int64_t i = 0; i < kTileQueries; i += kLanes<T>) {
    Vec<T> stick = load(rows.stick + i), tail = load(rows.tail + i), rest = load(rows.rest + i);
    const IntVec<T> first = load_int<T>(rows.first + i), last = load_int<T>(rows.last + i);
    for (int64_t j = keys - 1; j >= 0; --j) {
      T* cell = tile + j * kTileQueries + i;
      T* grad_cell = grad + j * kTileQueries + i;
      IntVec<T> seen{};
      if (kMasked) seen = seen_lanes<T>(k0 + j, key_ok, j, first, last);
      const Break<T> b = break_stick<T>(load(cell), kMasked, seen, stick, tail);
      Vec<T> term = b.weight * load(grad_cell);
      // Unseen lanes may hold anything, NaN included: 0 * NaN must not enter.
      if (kMasked) term = seen ? term : zero;
      const Vec<T> older = b.stick_before < floor ? zero : rest;
      store(cell, b.weight);
      store(grad_cell, fma(zero - b.z, older, term));
      rest -= term;
    }
    store(rows.stick + i, stick);
    store(rows.tail + i, tail);
    store(rows.rest + i, rest);
  }
}

// Whether every stick of the tile is used up to `stop` (0: never).
template <class T>
bool exhausted(const Rows<T>& rows, T stop) {
  T longest = 0;
  for (int64_t i = 0; i < kTileQueries; ++i) longest = rows.stick[i] > longest || rows.stick[i] != rows.stick[i] ? rows.stick[i] : longest;
  return longest < stop;
}

}  // namespace megamf
