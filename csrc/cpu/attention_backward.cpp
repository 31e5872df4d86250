// Fused stick-breaking attention, backward: for a tile of 64 queries, a walk down from the newest key recomputes weights
// and shares into a strip (64 columns, a row for each key walked), a walk up yields all three gradients.
//
// The work of a key/value head is cut into `splits` lists of query tiles. Each list has its own accumulators for
// dK and dV and is walked by one thread in a fixed order; the lists are then added in order. So the result does not
// depend on scheduling, and the number of lists, hence every bit, is the same for 1 to kMinUnits threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "attention.h"

namespace megamf {

namespace {

constexpr int64_t kMinUnits = 8;

int64_t num_splits(const Shape& s) {
  const int64_t units = std::max<int64_t>(kMinUnits, at::get_num_threads());
  const int64_t heads = std::max<int64_t>(1, s.B * s.G);
  const int64_t lists = std::max<int64_t>(1, s.H / s.G * s.query_tiles());
  return std::min((units + heads - 1) / heads, lists);
}

template <class T>
struct Scratch {
  Buffer<T> q, qt, grad_o, grad_ot, grad_q, weights, shares, grad_l;
  Rows<T> rows;
  Scratch(int64_t width, int64_t pitch, int64_t S)
      : q(kTileQueries * pitch),
        qt(width * kTileQueries),
        grad_o(kTileQueries * pitch),
        grad_ot(width * kTileQueries),
        grad_q(kTileQueries * pitch),
        weights((S + kTileKeys) * kTileQueries),
        shares((S + kTileKeys) * kTileQueries),
        grad_l(kTileKeys * kTileQueries) {}
};

template <class In>
struct Backward {
  using T = Acc<In>;
  const at::Tensor &grad_o_BHTC, &q_BHTC;
  const Visibility& vis;
  const Rows4<T>&keys, &values;
  T scale, stop;
  Shape s;
  at::Tensor& grad_q_BHTC;
  const T* grad_log_rem_BHT;  // null: no gradient comes from what is left of the stick

  int64_t width() const { return padded<T>(s.C); }
  int64_t pitch() const { return spread<T>(s.C); }

  void query_tile(int64_t b, int64_t h, int64_t index, T* grad_k, T* grad_v, Scratch<T>& w) const {
    const int64_t g = h % s.G;
    const QueryTile<T> tile(vis, b, index, w.rows);
    std::fill_n(w.grad_q.get(), kTileQueries * pitch(), T(0));
    if (tile.live) {
      read_queries<In, T>(q_BHTC, vis, tile, h, scale, w.q.get(), pitch(), width());
      read_queries<In, T>(grad_o_BHTC, vis, tile, h, T(1), w.grad_o.get(), pitch(), width());
      transpose_tile(w.q.get(), pitch(), width(), w.qt.get());
      transpose_tile(w.grad_o.get(), pitch(), width(), w.grad_ot.get());
      for (int64_t i = 0; grad_log_rem_BHT && i < tile.queries; ++i)
        if (tile.lane_live(vis, i)) w.rows.prefix[i] = grad_log_rem_BHT[(b * s.H + h) * s.T + tile.t0 + i];
      walk(tile, g, grad_k, grad_v, w);
    }
    for (int64_t i = 0; i < tile.queries; ++i)
      write_row(w.grad_q.get() + i * pitch(),
                grad_q_BHTC.mutable_data_ptr<In>() + b * grad_q_BHTC.stride(0) + h * grad_q_BHTC.stride(1) +
                    (tile.t0 + i) * grad_q_BHTC.stride(2),
                s.C, scale);
  }

  void walk(const QueryTile<T>& tile, int64_t g, T* grad_k, T* grad_v, Scratch<T>& w) const {
    int64_t end = tile.newest_end, steps = 0;
    for (; end > tile.oldest && !exhausted<T>(w.rows, stop); ++steps) {
      const int64_t k0 = std::max(tile.oldest, end - kTileKeys);
      down(tile, g, k0, end - k0, steps * kTileKeys * kTileQueries, w);
      end = k0;
    }
    for (; steps > 0; --steps) {
      const int64_t k0 = end;
      end = tile.newest_end - (steps - 1) * kTileKeys;
      up(tile, g, k0, end - k0, (steps - 1) * kTileKeys * kTileQueries, grad_k, grad_v, w);
    }
  }

  void down(const QueryTile<T>& tile, int64_t g, int64_t k0, int64_t count, int64_t at, Scratch<T>& w) const {
    const Part part = tile.square(vis, k0, count) ? Part::kUpperC : Part::kAll;
    T *a = w.weights.get() + at, *z = w.shares.get() + at;
    gemm(false, part, count, tile.lanes, width(), keys.row(tile.b, g, k0), keys.s, 1, w.qt.get(), kTileQueries, a, kTileQueries);
    if (tile.full(vis, k0, count))
      walk_down<T, false, true, false>(a, z, tile.lanes, count, k0, nullptr, w.rows);
    else
      walk_down<T, true, true, false>(a, z, tile.lanes, count, k0, vis.key_live_BS.data() + tile.b * s.S + k0, w.rows);
  }

  void up(const QueryTile<T>& tile, int64_t g, int64_t k0, int64_t count, int64_t at, T* grad_k, T* grad_v, Scratch<T>& w) const {
    const bool square = tile.square(vis, k0, count);
    const Part upper_c = square ? Part::kUpperC : Part::kAll, upper_a = square ? Part::kUpperA : Part::kAll,
               lower_a = square ? Part::kLowerA : Part::kAll;
    const T *a = w.weights.get() + at, *z = w.shares.get() + at;
    T* l = w.grad_l.get();
    gemm(false, upper_c, count, tile.lanes, width(), values.row(tile.b, g, k0), values.s, 1, w.grad_ot.get(), kTileQueries, l,
         kTileQueries);
    walk_up(a, z, l, tile.lanes, count, w.rows);
    gemm(true, lower_a, tile.queries, width(), count, l, 1, kTileQueries, keys.row(tile.b, g, k0), keys.s, w.grad_q.get(), pitch());
    gemm(true, upper_a, count, width(), tile.queries, l, kTileQueries, 1, w.q.get(), pitch(), grad_k + k0 * pitch(), pitch());
    gemm(true, upper_a, count, width(), tile.queries, a, kTileQueries, 1, w.grad_o.get(), pitch(), grad_v + k0 * pitch(), pitch());
  }
};

// out[b, g, s, :] = sum over the splits, in order.
template <class In, class T>
void add_splits(const T* parts, int64_t splits, int64_t size, int64_t pitch, at::Tensor& out_BGSC) {
  const int64_t G = out_BGSC.size(1), S = out_BGSC.size(2), C = out_BGSC.size(3);
  In* out = out_BGSC.mutable_data_ptr<In>();
  at::parallel_for(0, out_BGSC.size(0) * G * S, 256, [&](int64_t begin, int64_t end) {
    std::vector<T> row(C);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t bg = n / S, s = n % S;
      const T* from = parts + bg * splits * size + s * pitch;
      std::copy(from, from + C, row.begin());
      for (int64_t p = 1; p < splits; ++p)
        for (int64_t c = 0; c < C; ++c) row[c] += from[p * size + c];
      write_row(row.data(), out + bg / G * out_BGSC.stride(0) + bg % G * out_BGSC.stride(1) + s * out_BGSC.stride(2), C, T(1));
    }
  });
}

template <class In>
void backward(const at::Tensor& grad_o_BHTC, const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
              const Visibility& vis, Acc<In> scale, Acc<In> stop, const Acc<In>* grad_log_rem, at::Tensor& grad_q,
              at::Tensor& grad_k, at::Tensor& grad_v) {
  using T = Acc<In>;
  const Shape s = shape_of(q_BHTC, k_BGSC);
  const bool clean = !vis.any_dead_key();
  const Rows4<T> keys = stage<In>(k_BGSC, vis.key_live_BS.data(), clean);
  const Rows4<T> values = same_rows(k_BGSC, v_BGSC) ? keys : stage<In>(v_BGSC, vis.key_live_BS.data(), clean);
  const Backward<In> pass{grad_o_BHTC, q_BHTC, vis, keys, values, scale, stop, s, grad_q, grad_log_rem};
  const int64_t splits = num_splits(s), size = s.S * pass.pitch(), tiles = s.query_tiles(), lanes = s.H / s.G * tiles;
  const auto options = k_BGSC.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor parts_k = at::empty({s.B * s.G * splits, size}, options), parts_v = at::empty_like(parts_k);

  at::parallel_for(0, s.B * s.G * splits, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(pass.width(), pass.pitch(), s.S);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t p = unit % splits, g = unit / splits % s.G, b = unit / splits / s.G;
      T *part_k = parts_k.mutable_data_ptr<T>() + unit * size, *part_v = parts_v.mutable_data_ptr<T>() + unit * size;
      std::fill(part_k, part_k + size, T(0));
      std::fill(part_v, part_v + size, T(0));
      for (int64_t n = lanes * p / splits; n < lanes * (p + 1) / splits; ++n)
        pass.query_tile(b, n / tiles * s.G + g, fold(n % tiles, tiles), part_k, part_v, scratch);
    }
  });
  add_splits<In, T>(parts_k.const_data_ptr<T>(), splits, size, pass.pitch(), grad_k);
  add_splits<In, T>(parts_v.const_data_ptr<T>(), splits, size, pass.pitch(), grad_v);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> stickbreaking_attention_backward_cpu(
    const at::Tensor& grad_o_BHTC, const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
    const std::optional<at::Tensor>& start_BT, const std::optional<at::Tensor>& key_mask_BS, double scale, double stop,
    const std::optional<at::Tensor>& grad_log_rem_BHT, bool causal) {
  check_attention(q_BHTC, k_BGSC, v_BGSC, causal);
  TORCH_CHECK_VALUE(grad_o_BHTC.sizes() == q_BHTC.sizes() && grad_o_BHTC.scalar_type() == q_BHTC.scalar_type(), "grad_o is ",
                    grad_o_BHTC.scalar_type(), " ", grad_o_BHTC.sizes(), ", expected that of q, ", q_BHTC.scalar_type(), " ",
                    q_BHTC.sizes());
  const Visibility vis = visibility(q_BHTC.size(0), q_BHTC.size(2), k_BGSC.size(2), causal, start_BT, key_mask_BS);
  // Expanded gradients (as of a sum) have no contiguous channels.
  const at::Tensor grad_o = grad_o_BHTC.stride(3) == 1 || grad_o_BHTC.size(3) <= 1 ? grad_o_BHTC : grad_o_BHTC.contiguous();
  TORCH_CHECK_VALUE(!grad_log_rem_BHT || grad_log_rem_BHT->sizes() == q_BHTC.sizes().slice(0, 3), "grad_log_rem has shape ",
                    grad_log_rem_BHT->sizes(), ", expected that of q without channels, ", q_BHTC.sizes());
  at::Tensor grad_q = at::empty_like(q_BHTC), grad_k = at::empty_like(k_BGSC), grad_v = at::empty_like(v_BGSC);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q_BHTC.scalar_type(), "stickbreaking_attention_backward", [&] {
    using T = Acc<scalar_t>;
    at::Tensor grad_log_rem;
    if (grad_log_rem_BHT) grad_log_rem = grad_log_rem_BHT->to(c10::CppTypeToScalarType<T>::value).contiguous();
    backward<scalar_t>(grad_o, q_BHTC, k_BGSC, v_BGSC, vis, static_cast<T>(scale), static_cast<T>(stop),
                       grad_log_rem.defined() ? grad_log_rem.const_data_ptr<T>() : nullptr, grad_q, grad_k, grad_v);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace megamf
