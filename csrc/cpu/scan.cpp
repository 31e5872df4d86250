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
      state.prefix[i] = 0;
      state.log_rem[i] = 0;
      state.log_rem_low[i] = 0;
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
    // The walk up needs the whole strip; the forward pass one tile.
    const int64_t strip = grad ? S + kTileKeys : kTileKeys;
    const Buffer<T> weights(strip * kTileQueries), shares(strip * kTileQueries), grad_l(kTileKeys * kTileQueries);
    Rows<T> state;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t x0 = n * kTileQueries;
      const RowTile<T> tile(x0, total, T_, S, start, state);
      std::fill_n(out + x0 * S, tile.rows * S, In(0));
      int64_t last = tile.newest_end, steps = 0;
      for (; last > tile.oldest; ++steps) {
        const int64_t k0 = std::max(tile.oldest, last - kTileKeys), at = grad ? steps * kTileKeys * kTileQueries : 0;
        T* a = weights.get() + at;
        gather(logits + x0 * S, S, tile.rows, k0, last - k0, a);
        walk_down<T, true, true, false>(a, shares.get() + at, kTileQueries, last - k0, k0, nullptr, state);
        if (!grad) scatter(a, S, tile.rows, k0, last - k0, out + x0 * S);
        last = k0;
      }
      for (; grad && steps > 0; --steps) {
        const int64_t k0 = last, at = (steps - 1) * kTileKeys * kTileQueries;
        last = tile.newest_end - (steps - 1) * kTileKeys;
        gather(grad + x0 * S, S, tile.rows, k0, last - k0, grad_l.get());
        walk_up(weights.get() + at, shares.get() + at, grad_l.get(), kTileQueries, last - k0, state);
        scatter(grad_l.get(), S, tile.rows, k0, last - k0, out + x0 * S);
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
