// Logits -> stick-breaking weights and back. A warp owns a row and walks it in tiles of 256 keys, 8 consecutive keys a lane:
// the logarithms of what each key leaves are summed inside the lane, across the lanes, and over the tiles.
//
// Forward: one pass, from the newest tile to the oldest. Backward: the gradient of a logit needs the sum of A * dA over older keys,
// and A needs the stick left by newer ones. A walk down notes the stick in front of each tile (4 bytes a tile, in shared
// memory), a walk up, while the row is still in the cache, finishes.
#include "device.h"
#include "kernels.h"

namespace megamf::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr float kSkipped = 1.0f;  // in place of a logarithm (never positive): the tile lies beyond the end of the stick

// A row, and this lane's place in it.
struct Lane {
  int64_t row, tiles;
  int lane;
  Visible seen;
  RowGroups groups;
  const uint8_t* mask;
  bool aligned;

  __device__ __forceinline__ Lane(const MegamfScan& scan, int64_t row, int64_t base)
      : row(row), lane(threadIdx.x % kLanes), seen{0, 0}, groups(row, scan.S, base < 0 ? 0 : base), aligned(base >= 0) {
    const RowIndex at(row, scan.rows_a_batch, scan.heads, scan.T);
    const int64_t i = at.batch * scan.start_stride + at.query;
    int64_t first = 0;
    if (scan.start)
      first = scan.start_is_long ? static_cast<const int64_t*>(scan.start)[i] : static_cast<const int32_t*>(scan.start)[i];
    seen = {first < 0 ? 0 : first, scan.causal ? scan.S - scan.T + at.query : scan.S - 1};
    mask = scan.mask ? scan.mask + at.batch * scan.mask_stride : nullptr;
    tiles = ceil_div(groups.count(), kLanes);
  }

  // Key of this lane's first element in a tile.
  __device__ __forceinline__ int64_t key(int64_t tile) const { return groups.first(tile * kLanes + lane); }

  // Bit i: key j + i is seen.
  __device__ __forceinline__ unsigned visible(int64_t j) const {
    unsigned bits = 0;
    if (!seen.any(j, kGroup)) return 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (seen(j + i) && (mask == nullptr || mask[j + i])) bits |= 1u << i;
    return bits;
  }

  // Which of the elements j .. j + 7 exist.
  __device__ __forceinline__ int begin(int64_t j) const { return j < 0 ? static_cast<int>(-j) : 0; }
  __device__ __forceinline__ int end(int64_t j) const { return groups.S - j < kGroup ? static_cast<int>(groups.S - j) : kGroup; }

  template <class T>
  __device__ __forceinline__ void load(const T* base, int64_t j, float (&x)[kGroup]) const {
    load_group(base + row * groups.S + j, aligned && groups.whole(j), begin(j), end(j), x);
  }

  template <class T>
  __device__ __forceinline__ void store(T* base, int64_t j, const float (&x)[kGroup]) const {
    if (j >= groups.S) return;
    store_group(base + row * groups.S + j, aligned && groups.whole(j), begin(j), end(j), x);
  }

  __device__ __forceinline__ bool tile_visible(int64_t tile) const {
    return seen.any(groups.first(tile * kLanes), kTileKeys);
  }
};

// Breaks a stick at a lane's 8 keys; returns the logarithm of what they leave of it.
template <class In, bool kExact>
__device__ __forceinline__ float break_group(const Lane& at, const In* logits, float scale, int64_t j, unsigned bits,
                                             Share (&share)[kGroup]) {
  float logit[kGroup] = {}, total = 0;
  if (bits != 0) at.load(logits, j, logit);
#pragma unroll
  for (int i = kGroup - 1; i >= 0; --i) {
    share[i] = break_at<kExact>(logit[i] * scale);
    if (bits >> i & 1) total += share[i].log_left;
  }
  return total;
}

// From the logarithm of the stick in front of the lane's newest key to the weights; 0 where not seen.
template <bool kExact>
__device__ __forceinline__ void weigh_group(const Share (&share)[kGroup], unsigned bits, float log_stick, float (&weight)[kGroup]) {
#pragma unroll
  for (int i = kGroup - 1; i >= 0; --i) {
    const bool ok = bits >> i & 1;
    weight[i] = ok ? weight_of<kExact>(share[i], log_stick) : 0.0f;
    if (ok) log_stick += share[i].log_left;
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kWarps* kLanes) scan_forward(MegamfScan scan, Out* weights, float* log_rem, int64_t base) {
  constexpr bool kExact = std::is_same_v<Out, float>;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kLanes;
  if (row >= scan.rows) return;
  const Lane at(scan, row, base);
  const In* logits = static_cast<const In*>(scan.logits);
  const float log_stop = unit<kExact>(scan.log_stop);
  float log_stick = 0;
  for (int64_t tile = at.tiles - 1; tile >= 0; --tile) {
    const int64_t j = at.key(tile);
    float weight[kGroup] = {};
    if (at.tile_visible(tile) && !(log_stick < log_stop)) {
      const unsigned bits = at.visible(j);
      Share share[kGroup];
      const LaneSums newer = suffix_sums(break_group<In, kExact>(at, logits, scan.scale, j, bits, share), at.lane);
      weigh_group<kExact>(share, bits, log_stick + newer.exclusive, weight);
      log_stick += __shfl_sync(kAllLanes, newer.inclusive, 0);
    }
    at.store(weights, j, weight);
  }
  if (log_rem && at.lane == 0) log_rem[row] = log_stick / unit<kExact>(1.0f);
}

template <class In, class Out>
__global__ void __launch_bounds__(kWarps* kLanes)
    scan_backward(MegamfScan scan, const In* grad, const float* grad_log_rem, Out* weights, Out* grad_logits, int64_t base,
                  int64_t max_tiles) {
  constexpr bool kExact = std::is_same_v<Out, float>;
  MEGAMF_SHARED(float, all_sticks);
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes;
  const int64_t row = blockIdx.x * static_cast<int64_t>(warps) + warp;
  if (row >= scan.rows) return;
  const Lane at(scan, row, base);
  const In* logits = static_cast<const In*>(scan.logits);
  const float log_stop = unit<kExact>(scan.log_stop);
  float* log_sticks = all_sticks + warp * max_tiles;  // in front of each tile
  float log_stick = 0;
  for (int64_t tile = at.tiles - 1; tile >= 0; --tile) {
    const bool skip = !at.tile_visible(tile) || log_stick < log_stop;
    if (at.lane == 0) log_sticks[tile] = skip ? kSkipped : log_stick;
    if (skip) continue;
    const int64_t j = at.key(tile);
    Share share[kGroup];
    const float left = break_group<In, kExact>(at, logits, scan.scale, j, at.visible(j), share);
    log_stick += __shfl_sync(kAllLanes, suffix_sums(left, at.lane).inclusive, 0);  // the forward pass's bits
  }
  __syncwarp();
  float older = grad_log_rem ? grad_log_rem[row] : 0.0f;  // log_rem loses z_j by a logit, as a key older than all would
  for (int64_t tile = 0; tile < at.tiles; ++tile) {
    const int64_t j = at.key(tile);
    const float before = log_sticks[tile];
    float weight[kGroup] = {}, change[kGroup] = {};
    if (!(before > 0)) {
      const unsigned bits = at.visible(j);
      Share share[kGroup];
      const LaneSums newer = suffix_sums(break_group<In, kExact>(at, logits, scan.scale, j, bits, share), at.lane);
      weigh_group<kExact>(share, bits, before + newer.exclusive, weight);
      if (bits != 0) at.load(grad, j, change);
      float total = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        change[i] = bits >> i & 1 ? weight[i] * change[i] : 0.0f;
        total += change[i];
      }
      const LaneSums before_lane = prefix_sums(total, at.lane);
      float sum = older + before_lane.exclusive;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float term = change[i];
        change[i] = bits >> i & 1 ? scan.scale * logit_grad(share[i], term, sum) : 0.0f;
        sum += term;
      }
      older += __shfl_sync(kAllLanes, before_lane.inclusive, kLanes - 1);
    }
    if (weights) at.store(weights, j, weight);
    at.store(grad_logits, j, change);
  }
}

// Where the first row starts within an aligned group, the same for all arrays; -1 when they differ.
template <class In, class Out>
int64_t common_base(const void* logits, const void* grad, const void* weights, const void* grad_logits) {
  int64_t base = -2;
  for (const int64_t at : {element_address<In>(logits), grad ? element_address<In>(grad) : -2,
                           weights ? element_address<Out>(weights) : -2, grad_logits ? element_address<Out>(grad_logits) : -2}) {
    if (at == -1 || (at >= 0 && base >= 0 && at % kGroup != base)) return -1;
    if (at >= 0) base = at % kGroup;
  }
  return base;
}

struct Forward {
  const MegamfScan& scan;
  void* weights;
  float* log_rem;
  void* stream;
  template <class In, class Out>
  int run() const {
    return launch(&scan_forward<In, Out>, ceil_div(scan.rows, kWarps), kWarps * kLanes, 0, stream, scan, static_cast<Out*>(weights),
                  log_rem, common_base<In, Out>(scan.logits, nullptr, weights, nullptr));
  }
};

struct Backward {
  const MegamfScan& scan;
  const void* grad;
  const float* grad_log_rem;
  void *weights, *grad_logits, *stream;
  template <class In, class Out>
  int run() const {
    const int64_t tiles = ceil_div(scan.S + kGroup - 1, kTileKeys) + 1, bytes = tiles * static_cast<int64_t>(sizeof(float));
    if (bytes > kSharedBytes) return static_cast<int>(cudaErrorInvalidValue);
    const int64_t warps = kSharedBytes / bytes < kWarps ? kSharedBytes / bytes : kWarps;
    return launch(&scan_backward<In, Out>, ceil_div(scan.rows, warps), static_cast<int>(warps) * kLanes, warps * bytes, stream, scan,
                  static_cast<const In*>(grad), grad_log_rem, static_cast<Out*>(weights), static_cast<Out*>(grad_logits),
                  common_base<In, Out>(scan.logits, grad, weights, grad_logits), tiles);
  }
};

template <class F>
int with_types(const MegamfScan& scan, const F& run) {
  if (scan.rows == 0) return 0;
  const int32_t in = scan.type, out = scan.out_type;
  if (in == MEGAMF_F32 && out == MEGAMF_F32) return run.template run<float, float>();
  if (in == MEGAMF_F32 && out == MEGAMF_BF16) return run.template run<float, bf16>();
  if (in == MEGAMF_F32 && out == MEGAMF_F16) return run.template run<float, f16>();
  if (in == MEGAMF_BF16 && out == MEGAMF_BF16) return run.template run<bf16, bf16>();
  if (in == MEGAMF_F16 && out == MEGAMF_F16) return run.template run<f16, f16>();
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace
}  // namespace megamf::cuda

extern "C" int megamf_scan_forward(const MegamfScan* scan, void* weights, float* log_rem, void* stream) {
  return megamf::cuda::with_types(*scan, megamf::cuda::Forward{*scan, weights, log_rem, stream});
}

extern "C" int megamf_scan_backward(const MegamfScan* scan, const void* grad, const float* grad_log_rem, void* weights,
                                    void* grad_logits, void* stream) {
  return megamf::cuda::with_types(*scan, megamf::cuda::Backward{*scan, grad, grad_log_rem, weights, grad_logits, stream});
}
