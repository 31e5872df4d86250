// Logits -> stick-breaking weights, row by row, and the gradient: tiles are transposed so that the recurrence of
// stick.h runs over 64 rows at a time.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include "ops.h"
#include "heads.h"
#include "stick.h"

namespace megamf {

namespace {

template <class T>
struct RowTile {
  int64_t x0, rows;  // rows of the flattened [X*T] axis
  int64_t oldest, newest_end;

  RowTile(int64_t x0, int64_t total, int64_t T_, int64_t S, const int64_t* start, Rows<T>& state) : x0(x0) {
    rows = std::min(kTileQueries, total - x0);
    oldest = S;
    newest_end = 0;
    for (int64_t i = 0; i < kTileQueries; ++i) {
      state.stick[i] = i < rows ? 1 : 0;
      state.tail[i] = 0;
      state.rest[i] = 0;
      const int64_t last = i < rows ? S - T_ + (x0 + i) % T_ : -1;
      const int64_t first = i < rows ? (start ? std::clamp<int64_t>(start[x0 + i], 0, S) : 0) : 1;
      state.first[i] = static_cast<LaneInt<T>>(first);
      state.last[i] = static_cast<LaneInt<T>>(last);
      oldest = std::min(oldest, first);
      newest_end = std::max(newest_end, last + 1);
    }
  }
};

template <class In, class T>
void gather(const In* from, int64_t S, int64_t rows, int64_t k0, int64_t keys, T* tile) {
  for (int64_t i = 0; i < kTileQueries; ++i)
    for (int64_t j = 0; j < keys; ++j) tile[j * kTileQueries + i] = i < rows ? static_cast<T>(from[i * S + k0 + j]) : T(0);
}

template <class In, class T>
void scatter(const T* tile, int64_t S, int64_t rows, int64_t k0, int64_t keys, In* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < keys; ++j) to[i * S + k0 + j] = static_cast<In>(tile[j * kTileQueries + i]);
}

// grad == nullptr: out = weights. Otherwise out = gradient of the logits.
template <class In>
void scan(const In* logits, const In* grad, int64_t total, int64_t T_, int64_t S, const int64_t* start, In* out) {
  using T = Acc<In>;
  at::parallel_for(0, (total + kTileQueries - 1) / kTileQueries, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> a(kTileKeys * kTileQueries), l(kTileKeys * kTileQueries);
    Rows<T> state;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t x0 = n * kTileQueries;
      const RowTile<T> tile(x0, total, T_, S, start, state);
      const In* rows_in = logits + x0 * S;
      const In* rows_grad = grad ? grad + x0 * S : nullptr;
      In* rows_out = out + x0 * S;
      std::fill(rows_out, rows_out + tile.rows * S, In(0));
      // Pass 0 sums weight * gradient over the row (the D of stick.h); pass 1 writes.
      for (int pass = grad ? 0 : 1; pass < 2; ++pass) {
        std::vector<T> total_D(kTileQueries);
        for (int64_t end_key = tile.newest_end; end_key > tile.oldest;) {
          const int64_t k0 = std::max(tile.oldest, end_key - kTileKeys), keys = end_key - k0;
          gather(rows_in, S, tile.rows, k0, keys, a.data());
          if (grad) gather(rows_grad, S, tile.rows, k0, keys, l.data());
          if (pass == 1 && grad) {
            stick_backward<T, true>(a.data(), l.data(), keys, k0, nullptr, state);
            scatter(l.data(), S, tile.rows, k0, keys, rows_out);
          } else {
            stick_forward<T, true>(a.data(), keys, k0, nullptr, state);
            if (pass == 1) scatter(a.data(), S, tile.rows, k0, keys, rows_out);
            for (int64_t j = keys - 1; pass == 0 && j >= 0; --j)
              for (int64_t i = 0; i < kTileQueries; ++i) {
                const bool seen = k0 + j >= state.first[i] && k0 + j <= state.last[i];
                total_D[i] += seen ? a[j * kTileQueries + i] * l[j * kTileQueries + i] : T(0);
              }
          }
          end_key = k0;
        }
        if (pass == 0)
          for (int64_t i = 0; i < kTileQueries; ++i) {
            state.stick[i] = i < tile.rows ? 1 : 0;
            state.tail[i] = 0;
            state.rest[i] = total_D[i];
          }
      }
    }
  });
}

at::Tensor run(const at::Tensor& logits_XTS, const at::Tensor* grad_XTS, const std::optional<at::Tensor>& start_XT) {
  TORCH_CHECK_VALUE(logits_XTS.dim() >= 2, "logits have ", logits_XTS.dim(), " dimensions, expected at least 2 ([..., T, S])");
  const int64_t T_ = logits_XTS.size(-2), S = logits_XTS.size(-1);
  TORCH_CHECK_VALUE(T_ <= S && S < (int64_t(1) << 31) - 1, "T = ", T_, " queries, S = ", S, " keys; expected T <= S < 2^31 - 1");
  const at::Tensor logits = logits_XTS.contiguous();
  const at::Tensor grad = grad_XTS ? grad_XTS->contiguous() : at::Tensor();
  at::Tensor start;
  if (start_XT) {
    TORCH_CHECK_VALUE(start_XT->sizes() == logits_XTS.sizes().slice(0, logits_XTS.dim() - 1), "start has shape ",
                      start_XT->sizes(), ", expected that of the logits without the key axis, ", logits_XTS.sizes());
    start = start_XT->to(at::kLong).contiguous();
  }
  at::Tensor out = at::empty_like(logits, at::MemoryFormat::Contiguous);
  if (logits.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, logits.scalar_type(), "stickbreaking_scan", [&] {
    scan<scalar_t>(logits.const_data_ptr<scalar_t>(), grad.defined() ? grad.const_data_ptr<scalar_t>() : nullptr,
                   logits.numel() / S, T_, S, start.defined() ? start.const_data_ptr<int64_t>() : nullptr,
                   out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace

at::Tensor stickbreaking_scan_cpu(const at::Tensor& logits_XTS, const std::optional<at::Tensor>& start_XT) {
  return run(logits_XTS, nullptr, start_XT);
}

at::Tensor stickbreaking_scan_backward_cpu(const at::Tensor& grad_XTS, const at::Tensor& logits_XTS,
                                           const std::optional<at::Tensor>& start_XT) {
  return run(logits_XTS, &grad_XTS, start_XT);
}

}  // namespace megamf
