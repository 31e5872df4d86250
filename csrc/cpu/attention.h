// Stick-breaking attention: what the forward and the backward pass share.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "gemm.h"
#include "heads.h"
#include "stick.h"
#include "visibility.h"

namespace megamf {

at::Tensor stickbreaking_attention_cpu(const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
                                       const std::optional<at::Tensor>& start_BT, const std::optional<at::Tensor>& key_mask_BS,
                                       double scale, double stop, bool causal);

// Also log_rem [B, H, T]: the sum of log(1 - z) over the keys that were walked.
std::tuple<at::Tensor, at::Tensor> stickbreaking_attention_rest_cpu(
    const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC, const std::optional<at::Tensor>& start_BT,
    const std::optional<at::Tensor>& key_mask_BS, double scale, double stop, bool causal);

std::tuple<at::Tensor, at::Tensor, at::Tensor> stickbreaking_attention_backward_cpu(
    const at::Tensor& grad_o_BHTC, const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC,
    const std::optional<at::Tensor>& start_BT, const std::optional<at::Tensor>& key_mask_BS, double scale, double stop,
    const std::optional<at::Tensor>& grad_log_rem_BHT, bool causal);

// Raises unless the shapes, types and layouts fit together.
void check_attention(const at::Tensor& q_BHTC, const at::Tensor& k_BGSC, const at::Tensor& v_BGSC, bool causal);

// K = V: one staged copy serves both.
inline bool same_rows(const at::Tensor& k_BGSC, const at::Tensor& v_BGSC) {
  return k_BGSC.const_data_ptr() == v_BGSC.const_data_ptr() && k_BGSC.strides() == v_BGSC.strides();
}

struct Shape {
  int64_t B, H, G, T, S, C;
  int64_t query_tiles() const { return (T + kTileQueries - 1) / kTileQueries; }
};

inline Shape shape_of(const at::Tensor& q_BHTC, const at::Tensor& k_BGSC) {
  return {q_BHTC.size(0), q_BHTC.size(1), k_BGSC.size(1), q_BHTC.size(2), k_BGSC.size(2), q_BHTC.size(3)};
}

// Late query tiles see more keys. Taking them from both ends in turn makes every contiguous share of the list about
// equally long: the scheduler splits it statically.
inline int64_t fold(int64_t n, int64_t count) { return n % 2 == 0 ? n / 2 : count - 1 - n / 2; }

// The queries of one tile: which keys to walk, in tiles from the newest to the oldest.
template <class T>
struct QueryTile {
  int64_t b, t0, queries;
  int64_t lanes;       // queries, rounded up to whole vectors
  int64_t newest_end;  // one past the newest key of any live query
  int64_t oldest;      // oldest key of any live query
  int64_t common_first, common_end;  // keys in [common_first, common_end) are seen by all lanes, unless masked
  bool live;

  QueryTile(const Visibility& vis, int64_t ib, int64_t tile, Rows<T>& rows) : b(ib), t0(tile * kTileQueries) {
    queries = std::min(kTileQueries, vis.T - t0);
    lanes = padded<T>(queries);
    newest_end = 0;
    oldest = vis.S;
    common_first = 0;
    common_end = vis.last(t0) + 1;
    live = false;
    for (int64_t i = 0; i < kTileQueries; ++i) {
      const bool lane = i < queries && vis.query_live_BT[b * vis.T + t0 + i];
      rows.stick[i] = lane ? 1 : 0;
      rows.tail[i] = 0;
      rows.prefix[i] = 0;
      rows.log_rem[i] = 0;
      rows.log_rem_low[i] = 0;
      if (!lane) {  // sees nothing
        rows.first[i] = 1;
        rows.last[i] = 0;
        common_end = 0;
        continue;
      }
      const int64_t first = vis.first_BT[b * vis.T + t0 + i], last = vis.last(t0 + i);
      rows.first[i] = static_cast<LaneInt<T>>(first);
      rows.last[i] = static_cast<LaneInt<T>>(last);
      newest_end = std::max(newest_end, last + 1);
      oldest = std::min(oldest, first);
      common_first = std::max(common_first, first);
      live = true;
    }
  }

  bool lane_live(const Visibility& vis, int64_t i) const {
    return i < queries && vis.query_live_BT[b * vis.T + t0 + i];
  }

  // Whether every lane sees every key of [k0, k0 + keys).
  bool full(const Visibility& vis, int64_t k0, int64_t keys) const {
    if (k0 < common_first || k0 + keys > common_end) return false;
    if (vis.all_keys_B[b]) return true;
    const uint8_t* live_keys = vis.key_live_BS.data() + b * vis.S + k0;
    return std::all_of(live_keys, live_keys + keys, [](uint8_t ok) { return ok; });
  }

  // The newest tile when it is the exact square on the diagonal: key row r is seen by query lanes >= r.
  bool square(const Visibility& vis, int64_t k0, int64_t keys) const {
    return vis.causal && k0 == vis.last(t0) && keys == kTileQueries;
  }
};

// A transposed copy, [width, kTileQueries], of the rows [kTileQueries, width].
template <class T>
void transpose_tile(const T* rows, int64_t pitch, int64_t width, T* out) {
  for (int64_t c0 = 0; c0 < width; c0 += kLanes<T>)
    for (int64_t i = 0; i < kTileQueries; ++i)
      for (int64_t c = c0; c < c0 + kLanes<T>; ++c) out[c * kTileQueries + i] = rows[i * pitch + c];
}

// Reads the live query rows of a [B, H, T, C] tensor, zeros elsewhere.
template <class In, class T>
void read_queries(const at::Tensor& x_BHTC, const Visibility& vis, const QueryTile<T>& tile, int64_t h, T scale, T* out,
                  int64_t pitch, int64_t width) {
  const In* from = x_BHTC.const_data_ptr<In>() + tile.b * x_BHTC.stride(0) + h * x_BHTC.stride(1);
  const int64_t C = x_BHTC.size(3);
  for (int64_t i = 0; i < kTileQueries; ++i)
    read_row<In, T>(from + (tile.t0 + i) * x_BHTC.stride(2), out + i * pitch, tile.lane_live(vis, i) ? C : 0, width, scale);
}

}  // namespace megamf
