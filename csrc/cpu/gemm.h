// Small matrix products on blocks that sit in cache: C[m, n] (+)= A[m, k] B[k, n], row-major B and C, n a multiple of
// the vector width, A addressed by two strides (so A^T costs nothing). The order of summation depends on the
// shapes alone, never on the number of threads.
#pragma once

#include <algorithm>

#include "vec.h"

namespace megamf {

constexpr int kMicroRows = 6;
// 6 x 4 accumulators, 4 rows of B and one broadcast fill the 32 registers of AVX-512; 6 x 2 the 16 of AVX2.
constexpr int kMicroVecs = kVecBytes == 64 ? 4 : 2;
// Rows of B that one pass touches: 128 x 64 floats = 32 KiB stay in L1.
constexpr int64_t kDepthBlock = 128;

template <class T, int kRows, int kVecs, bool kAdd>
MEGAMF_INLINE void micro(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t depth) {
  Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec<T>{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec<T> row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = splat<T>(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
    a += a_depth;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      T* cell = c + r * ldc + v * kLanes<T>;
      // Block sums first: over thousands of keys one running sum would lose ten times as much to rounding.
      store(cell, kAdd ? load(cell) + acc[r][v] : acc[r][v]);
    }
  }
}

// The part of a product that matters when one operand is triangular (a diagonal tile: key r is seen by queries >= r).
enum class Part {
  kAll,
  kUpperC,   // only C[r, c] with c >= r is needed
  kUpperA,   // A[r, d] is zero for d < r
  kLowerA,   // A[r, d] is zero for d > r
};

template <class T, int kRows, int kVecs, bool kAdd>
void panel_step(Part part, int64_t r, int64_t col, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t ldb, T* c,
                int64_t ldc, int64_t d0, int64_t d1) {
  if (part == Part::kUpperC && col + kVecs * kLanes<T> <= r) return;
  if (part == Part::kUpperA) d0 = std::max(d0, std::min(r, d1));
  if (part == Part::kLowerA) d1 = std::max(d0, std::min(d1, r + kRows));
  micro<T, kRows, kVecs, kAdd>(a + r * a_row + d0 * a_depth, a_row, a_depth, b + d0 * ldb + col, ldb, c + r * ldc + col, ldc,
                               d1 - d0);
}

template <class T, int kVecs, bool kAdd>
void panel(Part part, int64_t col, int64_t m, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t ldb, T* c,
           int64_t ldc, int64_t d0, int64_t d1) {
  int64_t r = 0;
  for (; r + kMicroRows <= m; r += kMicroRows)
    panel_step<T, kMicroRows, kVecs, kAdd>(part, r, col, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
  for (; r + 2 <= m; r += 2) panel_step<T, 2, kVecs, kAdd>(part, r, col, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
  for (; r < m; ++r) panel_step<T, 1, kVecs, kAdd>(part, r, col, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
}

template <class T, bool kAdd>
void gemm_depth(Part part, int64_t m, int64_t n, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t ldb, T* c,
                int64_t ldc, int64_t d0, int64_t d1) {
  constexpr int kWide = kMicroVecs * kLanes<T>;
  int64_t col = 0;
  for (; col + kWide <= n; col += kWide)
    panel<T, kMicroVecs, kAdd>(part, col, m, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
  for (; col < n; col += kLanes<T>) panel<T, 1, kAdd>(part, col, m, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
}

template <class T>
void gemm(bool add, Part part, int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_depth, const T* b,
          int64_t ldb, T* c, int64_t ldc) {
  for (int64_t d0 = 0; d0 < k; d0 += kDepthBlock) {
    const int64_t d1 = std::min(k, d0 + kDepthBlock);
    if (add || d0 > 0)
      gemm_depth<T, true>(part, m, n, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
    else
      gemm_depth<T, false>(part, m, n, a, a_row, a_depth, b, ldb, c, ldc, d0, d1);
  }
}

}  // namespace megamf
