#include "visibility.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace megamf {

namespace {

std::vector<int64_t> starts(const at::Tensor& start_BT, int64_t B, int64_t T, int64_t S) {
  TORCH_CHECK_VALUE(start_BT.dim() == 2 && start_BT.size(0) == B && start_BT.size(1) == T, "start_BT has shape ",
                    start_BT.sizes(), ", expected [", B, ", ", T, "]");
  TORCH_CHECK_VALUE(start_BT.scalar_type() == at::kInt || start_BT.scalar_type() == at::kLong, "start_BT is ",
                    start_BT.scalar_type(), ", expected int32 or int64");
  const at::Tensor wide = start_BT.to(at::kLong).contiguous();
  const int64_t* p = wide.const_data_ptr<int64_t>();
  std::vector<int64_t> out(B * T);
  for (int64_t n = 0; n < B * T; ++n) out[n] = std::clamp<int64_t>(p[n], 0, S);
  return out;
}

}  // namespace

bool Visibility::any_dead_key() const {
  return std::any_of(all_keys_B.begin(), all_keys_B.end(), [](uint8_t all) { return !all; });
}

Visibility visibility(int64_t B, int64_t T, int64_t S, bool causal, const std::optional<at::Tensor>& start_BT,
                      const std::optional<at::Tensor>& key_mask_BS) {
  // Positions live in 32-bit lanes next to the float logits.
  TORCH_CHECK_VALUE(S < (int64_t(1) << 31) - 1, "S = ", S, " keys, at most 2^31 - 2 are supported");
  Visibility vis{B, T, S, causal, {}, std::vector<uint8_t>(B * T), std::vector<uint8_t>(B * S), std::vector<uint8_t>(B)};
  vis.first_BT = start_BT ? starts(*start_BT, B, T, S) : std::vector<int64_t>(B * T, 0);
  at::Tensor mask;
  if (key_mask_BS) {
    TORCH_CHECK_VALUE(key_mask_BS->dim() == 2 && key_mask_BS->size(0) == B && key_mask_BS->size(1) == S,
                      "key_mask_BS has shape ", key_mask_BS->sizes(), ", expected [", B, ", ", S, "]");
    TORCH_CHECK_VALUE(key_mask_BS->scalar_type() == at::kBool, "key_mask_BS is ", key_mask_BS->scalar_type(), ", expected bool");
    mask = key_mask_BS->contiguous();
  }
  std::vector<int64_t> unmasked_before(S + 1), cover(S + 1);
  for (int64_t b = 0; b < B; ++b) {
    const bool* ok = mask.defined() ? mask.const_data_ptr<bool>() + b * S : nullptr;
    for (int64_t j = 0; j < S; ++j) unmasked_before[j + 1] = unmasked_before[j] + (ok == nullptr || ok[j]);
    std::fill(cover.begin(), cover.end(), 0);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t first = vis.first_BT[b * T + t], end = vis.last(t) + 1;
      const bool live = first < end && unmasked_before[end] > unmasked_before[first];
      vis.query_live_BT[b * T + t] = live;
      if (!live) continue;
      ++cover[first];
      --cover[end];
    }
    int64_t depth = 0;
    bool all = true;
    for (int64_t j = 0; j < S; ++j) {
      depth += cover[j];
      const bool live = depth > 0 && (ok == nullptr || ok[j]);
      vis.key_live_BS[b * S + j] = live;
      all = all && live;
    }
    vis.all_keys_B[b] = all;
  }
  return vis;
}

}  // namespace megamf
