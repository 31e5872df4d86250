// One query a sequence against a cache of S keys. The keys are split into parts that run side by side; a part walks tiles of 32
// keys from its newest on and leaves its output and the logarithm of what is left of a stick. A second kernel puts them
// together, the newest first: o = o_newer + stick_newer * o_older. Every key and value is read once.
#include "device.h"
#include "kernels.h"

namespace megamf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTile = 32;                      // keys: one a lane in the scan
constexpr int kKeysAWarp = kTile / kWarps;
constexpr int64_t kLeastKeys = 128;            // of a part
static_assert(kMegamfDecodeChannels <= kThreads * kGroup);

__device__ __forceinline__ int64_t first_key(const MegamfDecode& d, int64_t b) {
  if (d.start == nullptr) return 0;
  const int64_t at = b * d.start_stride;
  const int64_t first = d.start_is_long ? static_cast<const int64_t*>(d.start)[at] : static_cast<const int32_t*>(d.start)[at];
  return first < 0 ? 0 : first;
}

// Which heads a block works for: up to kHeads query heads that share key head g, one part of the keys.
template <int kHeads>
struct Block {
  int64_t b, g, part, head0, heads;
  __device__ __forceinline__ Block(const MegamfDecode& d, int64_t index) {
    const int64_t repeat = d.H / d.G, chunks = ceil_div(repeat, kHeads);
    part = index % d.parts;
    const int64_t chunk = index / d.parts % chunks;
    g = index / d.parts / chunks % d.G;
    b = index / d.parts / chunks / d.G;
    head0 = chunk * kHeads;
    heads = repeat - head0 < kHeads ? repeat - head0 : kHeads;
  }
  __device__ __forceinline__ int64_t head(const MegamfDecode& d, int64_t i) const { return (head0 + i) * d.G + g; }
};

// How many of the channels c .. c + 7 exist.
__device__ __forceinline__ int count_of(const MegamfDecode& d, int64_t c) {
  return d.C - c < kGroup ? static_cast<int>(d.C - c) : kGroup;
}

template <class T, int kHeads>
__global__ void __launch_bounds__(kThreads)
    decode_part(MegamfDecode d, int aligned, int width, float* partial_o, float* partial_log) {
  constexpr bool kExact = std::is_same_v<T, float>;
  MEGAMF_SHARED(float, queries);  // [kHeads, width * kGroup]; at the end the output
  __shared__ float weights[kHeads][kTile];  // logits first
  __shared__ float log_sticks[kHeads];
  __shared__ int seen_keys[kTile];
  const Block<kHeads> at(d, blockIdx.x);
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  const int64_t first = first_key(d, at.b), channels = width * kGroup;
  const KeyRange range(d.S, at.part, d.parts, kTile);
  if (range.begin >= range.end || range.end <= first) return;  // the whole block
  const uint8_t* mask = d.mask ? d.mask + at.b * d.mask_stride : nullptr;
  const T* q = static_cast<const T*>(d.q) + at.b * d.q_strides[0];
  const T* k = static_cast<const T*>(d.k) + at.b * d.k_strides[0] + at.g * d.k_strides[1];
  const T* v = static_cast<const T*>(d.v) + at.b * d.v_strides[0] + at.g * d.v_strides[1];
  const float log_stop = unit<kExact>(d.log_stop);

  for (int64_t i = thread; i < kHeads * channels; i += kThreads) {
    const int64_t h = i / channels, c = i % channels;
    queries[i] = h < at.heads && c < d.C ? widen(q[at.head(d, h) * d.q_strides[1] + c]) * d.scale : 0.0f;
  }
  if (thread < kHeads) log_sticks[thread] = 0;
  // In the value pass a thread owns 8 channels and every `parties`-th key.
  const int slot = thread % width, party = thread / width, parties = kThreads / width;
  const int64_t slots = ceil_div(d.C, kGroup);
  float out[kHeads][kGroup] = {};
  __syncthreads();

  for (int64_t end = range.end; end > range.begin && end > first; end -= kTile) {
    const int64_t j0 = end - kTile;
    float dot[kKeysAWarp][kHeads] = {};
    for (int64_t s = lane; s < slots; s += kLanes) {
#pragma unroll
      for (int i = 0; i < kKeysAWarp; ++i) {
        const int64_t j = j0 + i * kWarps + warp;
        if (j < range.begin || j < first || (mask && !mask[j])) continue;
        float key[kGroup];
        load_group(k + j * d.k_strides[2] + s * kGroup, aligned, 0, count_of(d, s * kGroup), key);
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int e = 0; e < kGroup; ++e) dot[i][h] += queries[h * channels + s * kGroup + e] * key[e];
      }
    }
#pragma unroll
    for (int i = 0; i < kKeysAWarp; ++i)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float logit = sum_lanes(dot[i][h], kLanes);
        if (lane == 0) weights[h][i * kWarps + warp] = logit;
      }
    __syncthreads();
    if (warp < kHeads) {
      const int64_t j = j0 + lane;
      const bool seen = j >= range.begin && j >= first && (mask == nullptr || mask[j]);
      const Share share = break_at<kExact>(weights[warp][lane]);
      const LaneSums newer = suffix_sums(seen ? share.log_left : 0.0f, lane);
      const float log_stick = log_sticks[warp];
      weights[warp][lane] = seen ? weight_of<kExact>(share, log_stick + newer.exclusive) : 0.0f;
      __syncwarp();
      if (lane == 0) log_sticks[warp] = log_stick + newer.inclusive;
      if (warp == 0) seen_keys[lane] = seen;
    }
    __syncthreads();
    if (slot < slots) {
#pragma unroll 4
      for (int i = party; i < kTile; i += parties) {
        if (!seen_keys[i]) continue;  // its row may hold anything
        float value[kGroup];
        load_group(v + (j0 + i) * d.v_strides[2] + static_cast<int64_t>(slot) * kGroup, aligned, 0,
                   count_of(d, static_cast<int64_t>(slot) * kGroup), value);
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int e = 0; e < kGroup; ++e) out[h][e] += weights[h][i] * value[e];
      }
    }
    bool used_up = true;
    for (int h = 0; h < at.heads; ++h) used_up = used_up && log_sticks[h] < log_stop;
    __syncthreads();
    if (used_up) break;
  }

  // The parties add their sums in a fixed order.
  for (int turn = 0; turn < parties; ++turn) {
    if (party == turn)
      for (int h = 0; h < kHeads; ++h)
        for (int e = 0; e < kGroup; ++e) {
          float& sum = queries[h * channels + slot * kGroup + e];
          sum = turn == 0 ? out[h][e] : sum + out[h][e];
        }
    __syncthreads();
  }
  for (int64_t i = thread; i < at.heads * d.C; i += kThreads) {
    const int64_t h = i / d.C, c = i % d.C, row = (at.b * d.H + at.head(d, h)) * d.parts + at.part;
    partial_o[row * d.C + c] = queries[h * channels + c];
    if (c == 0) partial_log[row] = log_sticks[h];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) decode_combine(MegamfDecode d, const float* partial_o, const float* partial_log, T* o) {
  constexpr bool kExact = std::is_same_v<T, float>;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= d.B * d.H * d.C) return;
  const int64_t row = i / d.C, c = i % d.C, first = first_key(d, row / d.H);
  const float log_stop = unit<kExact>(d.log_stop);
  float sum = 0, log_stick = 0;
  for (int64_t part = 0; part < d.parts; ++part) {
    const KeyRange range(d.S, part, d.parts, kTile);
    if (range.begin >= range.end || range.end <= first || log_stick < log_stop) break;
    sum += stick<kExact>(log_stick) * partial_o[(row * d.parts + part) * d.C + c];
    log_stick += partial_log[row * d.parts + part];
  }
  o[i] = narrow<T>(sum);
}

// Whether every row of 8-channel groups can be read 16 bytes at a time.
template <class T>
bool rows_aligned(const void* p, const int64_t* strides, int count, int64_t C) {
  const int64_t at = element_address<T>(p);
  bool ok = at >= 0 && at % kGroup == 0 && C % kGroup == 0;
  for (int i = 0; i < count; ++i) ok = ok && strides[i] % kGroup == 0;
  return ok;
}

template <class T, int kHeads>
int run_parts(const MegamfDecode& d, float* partial_o, float* partial_log, void* stream) {
  const bool aligned = rows_aligned<T>(d.k, d.k_strides, 3, d.C) && rows_aligned<T>(d.v, d.v_strides, 3, d.C);
  int width = 1;
  while (width * kGroup < d.C) width *= 2;
  const int64_t blocks = d.B * d.G * ceil_div(d.H / d.G, kHeads) * d.parts;
  return launch(&decode_part<T, kHeads>, blocks, kThreads, sizeof(float) * kHeads * width * kGroup, stream, d,
                static_cast<int>(aligned), width, partial_o, partial_log);
}

template <class T>
int run(const MegamfDecode& d, float* partial_o, float* partial_log, void* o, void* stream) {
  const int64_t repeat = d.H / d.G;
  const int error = repeat == 1   ? run_parts<T, 1>(d, partial_o, partial_log, stream)
                    : repeat == 2 ? run_parts<T, 2>(d, partial_o, partial_log, stream)
                                  : run_parts<T, 4>(d, partial_o, partial_log, stream);
  if (error != 0) return error;
  return launch(&decode_combine<T>, ceil_div(d.B * d.H * d.C, kThreads), kThreads, 0, stream, d,
                static_cast<const float*>(partial_o), static_cast<const float*>(partial_log), static_cast<T*>(o));
}

}  // namespace
}  // namespace megamf::cuda

extern "C" int64_t megamf_decode_parts(int64_t B, int64_t H, int64_t G, int64_t S, int64_t processors) {
  using namespace megamf::cuda;
  const int64_t repeat = H / G, blocks = B * G * ceil_div(repeat, repeat > 2 ? 4 : repeat);
  const int64_t wanted = blocks > 0 ? ceil_div(2 * processors, blocks) : 1, most = ceil_div(S, kLeastKeys);
  return wanted < most ? wanted : most > 1 ? most : 1;
}

extern "C" int megamf_decode(const MegamfDecode* decode, float* partial_o, float* partial_log, void* o, void* stream) {
  using namespace megamf::cuda;
  if (decode->B * decode->H * decode->C == 0) return 0;
  if (decode->C > kMegamfDecodeChannels) return static_cast<int>(cudaErrorInvalidValue);
  switch (decode->type) {
    case MEGAMF_F32:
      return run<float>(*decode, partial_o, partial_log, o, stream);
    case MEGAMF_BF16:
      return run<bf16>(*decode, partial_o, partial_log, o, stream);
    case MEGAMF_F16:
      return run<f16>(*decode, partial_o, partial_log, o, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}
