// Fixed-width SIMD on GCC/Clang vector extensions: one source for AVX-512, AVX2 and anything else the compiler knows.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MEGAMF_INLINE inline __attribute__((always_inline))

namespace megamf {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(kVecBytes)));
  typedef int32_t IntVec __attribute__((vector_size(kVecBytes)));
  typedef float VecU __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef int32_t IntVecU __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
};

template <>
struct Simd<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(kVecBytes)));
  typedef int64_t IntVec __attribute__((vector_size(kVecBytes)));
  typedef double VecU __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef int64_t IntVecU __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::IntVec;
template <class T>
using LaneInt = typename Simd<T>::Int;

template <class T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <class T>
MEGAMF_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::VecU*>(p);
}

template <class T>
MEGAMF_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Simd<T>::VecU*>(p) = x;
}

constexpr int64_t kLine = 64;  // bytes of a cache line

// One line, aligned at its destination, past the caches: it is not read before it is written, and pushes nothing out.
MEGAMF_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__x86_64__)
  for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
#else
  __builtin_memcpy(to, from, kLine);
#endif
}

// After the last streamed line of a thread, before others read.
MEGAMF_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
MEGAMF_INLINE IntVec<T> load_int(const LaneInt<T>* p) {
  return *reinterpret_cast<const typename Simd<T>::IntVecU*>(p);
}

template <class T>
MEGAMF_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of a zero, 0 + x would not
}

// Fused on purpose: the error term of a product must not be folded away by the compiler.
MEGAMF_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kLanes<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

MEGAMF_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  for (int i = 0; i < kLanes<double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#endif
}

template <class T>
MEGAMF_INLINE Vec<T> clamp(Vec<T> x, T lo, T hi) {
  // A NaN fails both comparisons and passes through.
  const Vec<T> lo_v = splat<T>(lo), hi_v = splat<T>(hi);
  x = x < lo_v ? lo_v : x;
  return x > hi_v ? hi_v : x;
}

template <class T>
MEGAMF_INLINE T sum(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_add_ps((__m512)x);
  else
    return _mm512_reduce_add_pd((__m512d)x);
#else
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
#endif
}

// e^x for |x| <= 87: x = n ln2 + r with |r| <= ln2/2, minimax polynomial of degree 6 (relative error 2e-9
// before rounding), exponent added as an integer.
MEGAMF_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> magic = splat<float>(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
  const Vec<float> t = fma(x, splat<float>(1.44269504f), magic);
  const Vec<float> n = t - magic;
  Vec<float> r = fma(n, splat<float>(-0.693359375f), x);
  r = fma(n, splat<float>(2.12194440e-4f), r);
  Vec<float> p = splat<float>(1.38367938e-3f);
  p = fma(p, r, splat<float>(8.37485707e-3f));
  p = fma(p, r, splat<float>(4.16682287e-2f));
  p = fma(p, r, splat<float>(1.66664197e-1f));
  p = fma(p, r, splat<float>(4.99999921e-1f));
  p = fma(p, r, splat<float>(1.0f));
  p = fma(p, r, splat<float>(1.0f));
  return (Vec<float>)((IntVec<float>)p + ((IntVec<float>)t << 23));
}

// e^x for |x| <= 708, Taylor polynomial of degree 13 on the same reduction (relative error 4e-18 before rounding).
MEGAMF_INLINE Vec<double> exp(Vec<double> x) {
  const Vec<double> magic = splat<double>(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> t = fma(x, splat<double>(1.4426950408889634), magic);
  const Vec<double> n = t - magic;
  Vec<double> r = fma(n, splat<double>(-6.93145751953125e-1), x);
  r = fma(n, splat<double>(-1.42860682030941723212e-6), r);
  Vec<double> p = splat<double>(1.0 / 6227020800.0);
  const double inverse_factorials[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                       1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                       0.5,             1.0,            1.0};
  for (double c : inverse_factorials) p = fma(p, r, splat<double>(c));
  return (Vec<double>)((IntVec<double>)p + ((IntVec<double>)t << 52));
}

// log(1 + u) for 0 <= u <= 1 as 2 atanh(s), s = u / (2 + u) <= 1/3, by its Taylor series: relative error of an ulp or two.
template <class T>
MEGAMF_INLINE Vec<T> log1p_unit(Vec<T> u) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
  const Vec<T> s = u / (u + splat<T>(2)), s2 = s * s;
  Vec<T> p = splat<T>(T(1) / T(2 * kTerms + 1));
#pragma GCC unroll 20
  for (int n = kTerms - 1; n > 0; --n) p = fma(p, s2, splat<T>(T(1) / T(2 * n + 1)));
  const Vec<T> half = fma(s * s2, p, s);
  return half + half;
}

template <class T>
constexpr T kMaxExponent = sizeof(T) == 4 ? T(87) : T(708);

}  // namespace megamf
