// Fused stick-breaking attention, forward: a tile of 64 queries walks tiles of 64 keys from the newest to the oldest.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "attention.h"

namespace megamf {

namespace {

template <class In, bool kRest>
void forward(const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC, const Visibility& vis, Acc<In> scale,
             Acc<In> stop, at::Tensor& o_BHTC, Acc<In>* log_rem_BHT) {
  using T = Acc<In>;
  const Shape s = shape_of(q_BHTC, k_BGSC);
  const int64_t width = padded<T>(s.C), pitch = spread<T>(s.C), tiles = s.query_tiles();
  const bool clean = !vis.any_dead_key();
  const Rows4<T> keys = stage<In>(k_BGSC, vis.key_live_BS.data(), clean);
  const Rows4<T> values = same_rows(k_BGSC, v_BGSC) ? keys : stage<In>(v_BGSC, vis.key_live_BS.data(), clean);

  at::parallel_for(0, s.B * s.H * tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> q(kTileQueries * pitch), qt(width * kTileQueries), o(kTileQueries * pitch), a(kTileKeys * kTileQueries);
    Rows<T> rows;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t h = n / tiles % s.H, b = n / tiles / s.H, g = h % s.G;
      const QueryTile<T> tile(vis, b, fold(n % tiles, tiles), rows);
      std::fill_n(o.get(), kTileQueries * pitch, T(0));
      if (tile.live) {
        read_queries<In, T>(q_BHTC, vis, tile, h, scale, q.get(), pitch, width);
        transpose_tile(q.get(), pitch, width, qt.get());
      }
      for (int64_t end_key = tile.newest_end; tile.live && end_key > tile.oldest && !exhausted<T>(rows, stop);) {
        const int64_t k0 = std::max(tile.oldest, end_key - kTileKeys), count = end_key - k0;
        const bool square = tile.square(vis, k0, count);
        gemm(false, square ? Part::kUpperC : Part::kAll, count, tile.lanes, width, keys.row(b, g, k0), keys.s, 1, qt.get(),
             kTileQueries, a.get(), kTileQueries);
        if (tile.full(vis, k0, count))
          walk_down<T, false, false, kRest>(a.get(), nullptr, tile.lanes, count, k0, nullptr, rows);
        else
          walk_down<T, true, false, kRest>(a.get(), nullptr, tile.lanes, count, k0, vis.key_live_BS.data() + b * s.S + k0, rows);
        gemm(true, square ? Part::kLowerA : Part::kAll, tile.queries, width, count, a.get(), 1, kTileQueries,
             values.row(b, g, k0), values.s, o.get(), pitch);
        end_key = k0;
      }
      for (int64_t i = 0; i < tile.queries; ++i) {
        const int64_t t = tile.t0 + i;
        write_row(o.get() + i * pitch,
                  o_BHTC.mutable_data_ptr<In>() + b * o_BHTC.stride(0) + h * o_BHTC.stride(1) + t * o_BHTC.stride(2), s.C, T(1));
        if (kRest) log_rem_BHT[(b * s.H + h) * s.T + t] = rows.log_rem[i] + rows.log_rem_low[i];
      }
    }
  });
}

}  // namespace

void check_attention(const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC, bool causal) {
  TORCH_CHECK_VALUE(q_BHTC.dim() == 4 && k_BGSC.dim() == 4, "q and k have ", q_BHTC.dim(), " and ", k_BGSC.dim(),
                    " dimensions, expected 4 and 4");
  TORCH_CHECK_VALUE(k_BGSC.sizes() == v_BGSC.sizes(), "k ", k_BGSC.sizes(), " and v ", v_BGSC.sizes(), " differ in shape");
  TORCH_CHECK_VALUE(q_BHTC.size(0) == k_BGSC.size(0) && q_BHTC.size(3) == k_BGSC.size(3), "q ", q_BHTC.sizes(), " and k ",
                    k_BGSC.sizes(), " differ in batch or channels");
  TORCH_CHECK_VALUE(!causal || q_BHTC.size(2) <= k_BGSC.size(2), "T = ", q_BHTC.size(2), " queries but S = ", k_BGSC.size(2), " keys");
  TORCH_CHECK_VALUE(k_BGSC.size(1) > 0 && q_BHTC.size(1) % k_BGSC.size(1) == 0, "H = ", q_BHTC.size(1),
                    " query heads are not a multiple of G = ", k_BGSC.size(1), " key heads");
  for (const at::Tensor* x : {&q_BHTC, &k_BGSC, &v_BGSC}) {
    TORCH_CHECK_VALUE(x->scalar_type() == q_BHTC.scalar_type(), "q, k and v must share one dtype, got ", q_BHTC.scalar_type(),
                      " and ", x->scalar_type());
    TORCH_CHECK_VALUE(x->stride(3) == 1 || x->size(3) <= 1, "the channel axis must be contiguous, its stride is ", x->stride(3));
  }
}

at::Tensor stickbreaking_attention_cpu(const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
                                       const std::optional<at::Tensor>& start_BT, const std::optional<at::Tensor>& key_mask_BS,
                                       double scale, double stop, bool causal) {
  check_attention(q_BHTC, k_BGSC, v_BGSC, causal);
  const Visibility vis = visibility(q_BHTC.size(0), q_BHTC.size(2), k_BGSC.size(2), causal, start_BT, key_mask_BS);
  at::Tensor o_BHTC = at::empty_like(q_BHTC);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q_BHTC.scalar_type(), "stickbreaking_attention", [&] {
    using T = Acc<scalar_t>;
    forward<scalar_t, false>(q_BHTC, k_BGSC, v_BGSC, vis, static_cast<T>(scale), static_cast<T>(stop), o_BHTC, nullptr);
  });
  return o_BHTC;
}

std::tuple<at::Tensor, at::Tensor> stickbreaking_attention_rest_cpu(
    const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC, const std::optional<at::Tensor>& start_BT,
    const std::optional<at::Tensor>& key_mask_BS, double scale, double stop, bool causal) {
  check_attention(q_BHTC, k_BGSC, v_BGSC, causal);
  const Visibility vis = visibility(q_BHTC.size(0), q_BHTC.size(2), k_BGSC.size(2), causal, start_BT, key_mask_BS);
  at::Tensor o_BHTC = at::empty_like(q_BHTC), log_rem_BHT;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q_BHTC.scalar_type(), "stickbreaking_attention_rest", [&] {
    using T = Acc<scalar_t>;
    log_rem_BHT = at::empty(q_BHTC.sizes().slice(0, 3), q_BHTC.options().dtype(c10::CppTypeToScalarType<T>::value));
    forward<scalar_t, true>(q_BHTC, k_BGSC, v_BGSC, vis, static_cast<T>(scale), static_cast<T>(stop), o_BHTC,
                            log_rem_BHT.mutable_data_ptr<T>());
  });
  return {o_BHTC, log_rem_BHT};
}

}  // namespace megamf
