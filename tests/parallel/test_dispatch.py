"""Who holds which experts. What the dispatchers do with them is compared in tests/parity."""

import pytest
import torch

from megamf.parallel.dispatch import counts_by_slot, share_of_experts, slots_of_experts


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 4), (7, 4), (5, 4), (4, 4), (9, 2), (3, 1), (48, 7)])
def test_contiguous_shares_that_differ_by_one_at_most(num_experts, num_ranks):
    shares = [share_of_experts(num_experts, rank, num_ranks) for rank in range(num_ranks)]
    assert [expert for share in shares for expert in share] == list(range(num_experts))
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
    assert slots_of_experts(num_experts, num_ranks) == max(sizes)
    counts = counts_by_slot(torch.arange(1, num_experts + 1), num_ranks).tolist()
    assert [[count - 1 for count in row if count] for row in counts] == [list(share) for share in shares]


def test_no_rank_without_an_expert():
    with pytest.raises(ValueError, match="3 experts cannot be shared out over 4"):
        share_of_experts(3, 0, 4)
