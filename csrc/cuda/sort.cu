// Stable counting sort of routed copies by expert. A block counts the experts of its stretch of copies, a single block turns
// the counts into positions, and each block places its copies: a warp at a time, lanes with the same expert in their order.
#include "device.h"
#include "kernels.h"

namespace megamf::cuda {
namespace {

constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int kMostWarps = 8;
constexpr int64_t kLeastStretch = 1024, kMostBlocks = 512;
constexpr int kScanThreads = 1024;
static_assert(kMegamfExperts * sizeof(int32_t) <= kSharedBytes);

// The stretch of copies of a block, and of this warp within it.
struct Stretch {
  int64_t begin, end;
  __device__ __forceinline__ Stretch(int64_t R, int64_t block_size, int warps, int warp) {
    const int64_t step = ceil_div(block_size, warps * kLanes) * kLanes, first = blockIdx.x * block_size;
    const int64_t block_end = first + block_size < R ? first + block_size : R;
    begin = first + warp * step;
    end = begin + step < block_end ? begin + step : block_end;
  }
};

__device__ __forceinline__ int expert_at(const int64_t* expert, int64_t n, int64_t end, int64_t E) {
  if (n >= end) return -1;
  const int64_t e = expert[n];
  MEGAMF_DEVICE_CHECK(e >= 0 && e < E);
  return static_cast<int>(e);
}

// next[e] += how often expert e occurs in the warp's stretch. kPlace: every copy goes to the position next[e] had for it.
template <bool kPlace>
__device__ __forceinline__ void walk(const int64_t* expert, int64_t E, const Stretch& stretch, int lane, int32_t* next,
                                     int64_t* order, int64_t* inverse) {
  for (int64_t n0 = stretch.begin; n0 < stretch.end; n0 += kLanes) {
    const int64_t n = n0 + lane;
    const int e = expert_at(expert, n, stretch.end, E);
    const unsigned same = __match_any_sync(kAllLanes, e), before = same & ((1u << lane) - 1);
    const int32_t at = e >= 0 ? next[e] : 0;
    __syncwarp();
    if (e >= 0 && before == 0) next[e] = at + __popc(same);
    __syncwarp();
    if (kPlace && e >= 0) {
      const int64_t r = at + __popc(before);
      order[r] = n;
      inverse[n] = r;
    }
  }
}

// Per warp the number of copies of each expert: counts [warps, E] in shared memory.
__device__ __forceinline__ void count_block(const int64_t* expert, int64_t R, int64_t E, int64_t block_size, int32_t* counts) {
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t i = threadIdx.x; i < warps * E; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  walk<false>(expert, E, Stretch(R, block_size, warps, warp), lane, counts + warp * E, nullptr, nullptr);
  __syncthreads();
}

// block_counts [E, blocks]
__global__ void sort_count(const int64_t* expert, int64_t R, int64_t E, int64_t block_size, int32_t* block_counts) {
  MEGAMF_SHARED(int32_t, counts);
  count_block(expert, R, E, block_size, counts);
  for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
    int32_t total = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kLanes; ++w) total += counts[w * E + e];
    block_counts[e * gridDim.x + blockIdx.x] = total;
  }
}

// In place: [E, blocks] counts -> the position of each block's first copy of each expert; and the totals. One block.
__global__ void __launch_bounds__(kScanThreads) sort_offsets(int32_t* block_counts, int64_t E, int64_t blocks, int64_t* count) {
  __shared__ int32_t warp_sums[kScanThreads / kLanes];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int32_t carry = 0;
  for (int64_t i0 = 0; i0 < E * blocks; i0 += kScanThreads) {
    const int64_t i = i0 + threadIdx.x;
    const int32_t mine = i < E * blocks ? block_counts[i] : 0;
    int32_t sum = mine;
    for (int d = 1; d < kLanes; d *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == kLanes - 1) warp_sums[warp] = sum;
    __syncthreads();
    int32_t before = 0, all = 0;
    for (int w = 0; w < kScanThreads / kLanes; ++w) {
      before += w < warp ? warp_sums[w] : 0;
      all += warp_sums[w];
    }
    if (i < E * blocks) block_counts[i] = carry + before + sum - mine;
    carry += all;
    __syncthreads();
  }
  for (int64_t e = threadIdx.x; e < E; e += kScanThreads)
    count[e] = blocks == 0 ? 0 : (e + 1 < E ? block_counts[(e + 1) * blocks] : carry) - block_counts[e * blocks];
}

__global__ void sort_place(const int64_t* expert, int64_t R, int64_t E, int64_t block_size, const int32_t* offsets, int64_t* order,
                           int64_t* inverse) {
  MEGAMF_SHARED(int32_t, next);  // [warps, E]: counts, then where the warp's next copy of the expert goes
  count_block(expert, R, E, block_size, next);
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
    int32_t at = offsets[e * gridDim.x + blockIdx.x];
    for (int w = 0; w < warps; ++w) {
      const int32_t here = next[w * E + e];
      next[w * E + e] = at;
      at += here;
    }
  }
  __syncthreads();
  walk<true>(expert, E, Stretch(R, block_size, warps, warp), lane, next + warp * E, order, inverse);
}

int64_t block_size(int64_t R) {
  const int64_t even = ceil_div(R, kMostBlocks);
  return ceil_div(even < kLeastStretch ? kLeastStretch : even, kMostWarps * kLanes) * kMostWarps * kLanes;
}

}  // namespace
}  // namespace megamf::cuda

extern "C" int64_t megamf_sort_blocks(int64_t R) { return megamf::cuda::ceil_div(R, megamf::cuda::block_size(R)); }

extern "C" int megamf_sort(const int64_t* expert, int64_t R, int64_t E, int32_t* scratch, int64_t* order, int64_t* inverse,
                           int64_t* count, void* stream) {
  using namespace megamf::cuda;
  if (E > kMegamfExperts || R >= int64_t(1) << 31) return static_cast<int>(cudaErrorInvalidValue);
  if (E == 0) return 0;
  const int64_t size = block_size(R), blocks = ceil_div(R, size), room = kSharedBytes / (E * static_cast<int64_t>(sizeof(int32_t)));
  int warps = kMostWarps;
  while (warps > room) warps /= 2;
  const size_t shared = sizeof(int32_t) * warps * E;
  int error = blocks ? launch(&sort_count, blocks, warps * kLanes, shared, stream, expert, R, E, size, scratch) : 0;
  if (error == 0) error = launch(&sort_offsets, 1, kScanThreads, 0, stream, scratch, E, blocks, count);
  if (error != 0 || blocks == 0) return error;
  return launch(&sort_place, blocks, warps * kLanes, shared, stream, expert, R, E, size, static_cast<const int32_t*>(scratch), order,
                inverse);
}
