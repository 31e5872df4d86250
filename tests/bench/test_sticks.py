"""A stick lasts as long as it was asked to."""

import pytest
import torch

from megamf.bench.sticks import sticks
from megamf.ops.stickbreaking import stickbreaking_attention


@pytest.mark.parametrize("tokens", [4, 64])
def test_what_is_left_of_a_stick_shrinks_by_one_over_tokens_a_key(tokens):
    torch.manual_seed(0)
    q, k, v = sticks(1, 2, 2048, 64, tokens)
    _, log_rem = stickbreaking_attention(q, k, v, return_log_rem=True)
    keys = torch.arange(1, 2049)
    assert float((log_rem.detach() / keys)[..., 200:].mean()) == pytest.approx(-1 / tokens, rel=0.1)
