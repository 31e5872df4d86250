// Which keys each query sees, and which rows nobody sees (their values, NaN included, must not enter any product).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace megamf {

struct Visibility {
  int64_t B, T, S;
  bool causal;                        // query t sees keys up to S - T + t; otherwise all of them
  std::vector<int64_t> first_BT;      // first key a query may see; > its own position when it sees none
  std::vector<uint8_t> query_live_BT; // sees at least one unmasked key
  std::vector<uint8_t> key_live_BS;   // unmasked and seen by at least one query
  std::vector<uint8_t> all_keys_B;    // every key of the row is live

  int64_t last(int64_t t) const { return causal ? S - T + t : S - 1; }
  bool any_dead_key() const;
};

Visibility visibility(int64_t B, int64_t T, int64_t S, bool causal, const std::optional<at::Tensor>& start_BT,
                      const std::optional<at::Tensor>& key_mask_BS);

}  // namespace megamf
