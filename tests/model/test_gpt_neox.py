"""GPT-NeoX against that of transformers, and what it has beyond it: document starts, a cache that forgets."""

import math

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megamf.hf.gpt_neox import public_name, to_model_config
from megamf.model import ModuleFormer, initialise
from megamf.model.gpt_neox import rotate, rotation, softmax_attention
from megamf.model.objective import Objective

TINY = {
    "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def pair(dtype=torch.float64, **changes):
    """Ours and theirs with the same random weights, all biases and norms included."""
    config = GPTNeoXConfig(**{**TINY, **changes}, attn_implementation="sdpa")
    torch.manual_seed(0)
    theirs = GPTNeoXForCausalLM(config)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    ours = ModuleFormer(to_model_config(config.to_dict()))
    state = {name.replace("lm_head", "embed_out"): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: state[public_name(name)] for name in ours.state_dict()})
    assert len(state) == len(ours.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def ids(batch, time, seed=0):
    return torch.randint(1, 37, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_same_logits_and_gradients(parallel, dtype, tolerance):
    ours, theirs = pair(dtype, use_parallel_residual=parallel, rotary_pct=0.5, rotary_emb_base=500, hidden_act="gelu")
    x = ids(2, 21)
    found, expected = ours.logits(ours(x).hidden_BTD), theirs(x).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    for logits in (found, expected):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    of = {name.replace("lm_head", "embed_out"): value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        wanted = of[public_name(name)]
        assert (value.grad - wanted).abs().max() <= 10 * tolerance * (1e-3 + wanted.abs().max()), name


def test_documents_are_each_on_their_own():
    ours, theirs = pair()
    x = ids(1, 12)
    start = torch.tensor([[0] * 5 + [5] * 7], dtype=torch.int32)
    found = ours.logits(ours(x, start_BT=start).hidden_BTD)
    for first, last in ((0, 5), (5, 12)):
        # The angles of later positions are rounded otherwise, in float32.
        assert torch.allclose(found[:, first:last], theirs(x[:, first:last]).logits, atol=1e-4)
    assert not torch.allclose(found[:, 5:], theirs(x).logits[:, 5:], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_queries_without_keys(side):
    ours, theirs = pair()
    x = ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, slice(4) if side == "left" else slice(5, None)] = 0
    found = ours.logits(ours(x, key_mask_BS=mask.bool()).hidden_BTD)
    expected = theirs(x, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-4)
    ours.zero_grad()
    found[mask.bool()].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


def test_a_query_without_keys_gives_zero_and_no_gradient():
    q, k, v = (torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    o = softmax_attention(q, k, v, torch.tensor([[0, 2, 1, 3]]))
    assert o[:, :, 1].eq(0).all() and o[:, :, [0, 2, 3]].ne(0).all()
    assert torch.allclose(o[:, :, 3], v[:, :, 3]) and torch.allclose(o[:, :, 0], v[:, :, 0])
    # Key 0 is seen by query 0 alone, whose softmax over one key has no gradient.
    o.sum().backward()
    assert q.grad[:, :, 1].eq(0).all() and k.grad[:, :, 0].abs().max() < 1e-15


def test_cache_and_segments():
    ours, _ = pair()
    x = ids(2, 14)
    whole = ours(x).hidden_BTD
    with torch.no_grad():
        cache = ours.new_cache()
        parts = [ours(piece, cache=cache).hidden_BTD for piece in x.split([6, 1, 4, 1, 2], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-11)
    # One layer sees no further than what is kept, so that forgetting the rest is the same as never having seen it.
    ours, _ = pair(num_hidden_layers=1)
    with torch.no_grad():
        cache = ours.new_cache()
        ours(x[:, :10], cache=cache)
        cache.keep_last(4)
        found = ours(x[:, 10:], cache=cache).hidden_BTD
        assert torch.allclose(found, ours(x[:, 6:]).hidden_BTD[:, 4:], rtol=1e-10)


def test_rotation_depends_on_distance_alone():
    cos, sin = rotation(40, 8, 10000.0, torch.empty(0, dtype=torch.float64))
    q, k = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = [rotate(q, cos[t], sin[t]) @ rotate(k, cos[t - 5], sin[t - 5]) for t in (5, 17, 39)]
    assert torch.allclose(scores[0], scores[1], atol=1e-5) and torch.allclose(scores[0], scores[2], atol=1e-5)
    assert torch.allclose(rotate(q, cos[9], sin[9]).norm(), q.norm(), atol=1e-6)
    # By hand: pair (0, 4) at position 3 turns by 3 / 10000^0 = 3, pair (1, 5) by 3 / 10000^(2/8) = 0.3.
    turned = rotate(torch.eye(12, dtype=torch.float64), cos[3], sin[3])
    assert turned[0, [0, 4]].tolist() == pytest.approx([math.cos(3), math.sin(3)], abs=1e-6)
    assert turned[1, [1, 5]].tolist() == pytest.approx([math.cos(0.3), math.sin(0.3)], abs=1e-6)
    assert torch.equal(turned[8:], torch.eye(12, dtype=torch.float64)[8:])


def test_recomputation_and_initial_weights():
    ours, _ = pair()
    x = ids(2, 9)
    gradients = []
    for mode in ("none", "full"):
        ours.train()
        ours.zero_grad()
        ours.set_activation_checkpointing(mode)
        loss, sums, norm = Objective(ours, 5)(x, x, None)
        assert sums is None and norm is None
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(torch.allclose(one, two, rtol=1e-10) for one, two in zip(*gradients))
    initialise(ours, ours.config, 0)
    for name, value in ours.state_dict().items():
        if name.endswith("bias"):
            assert value.eq(0).all()
        elif ".ln_" in name:
            assert value.eq(1).all()
        else:
            assert abs(value.std() / 0.3 - 1) < 0.2, name
