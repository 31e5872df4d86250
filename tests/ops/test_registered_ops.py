"""Every operation is known to torch: schema, fake kernel, autograd; and a whole block is one graph."""

import pytest
import torch
from torch.library import opcheck

import megamf.ops.expert_ffn
import megamf.ops.permutation.into
import megamf.ops.router  # noqa: F401
from megamf.config import ModelConfig
from megamf.model.block import Block
from megamf.model.dispatch import LocalDispatcher
from megamf.ops.permutation import sort_by_expert
from megamf.ops.stickbreaking import combine, document_starts, stickbreaking_attention, stickbreaking_decode

OPS = torch.ops.megamf
MODEL = ModelConfig(
    vocab_size=40, n_layer=1, n_embd=32, n_head=2, att_hidden=16, ffd_hidden=32, n_att_experts=4, n_mlp_experts=4,
    k_att=2, k_mlp=2, gating_size=8,
)  # fmt: skip


def test_every_operation_has_a_fake_kernel():
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("megamf::")}
    assert len(names) > 20
    without = {name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")}
    assert without == set()


def arguments():
    """Operation -> arguments, for all that run on a CPU (tests/kernels checks those that are Triton's)."""
    q, k, grad = (torch.randn(1, 2, n, 8, requires_grad=i < 2) for i, n in enumerate((5, 6, 5)))
    plain = q.detach(), k.detach(), torch.randn(1, 2, 6, 8)
    start, mask = torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool)
    logits = torch.randn(2, 3, 4)
    order_R, inverse_R, count_E = sort_by_expert(torch.tensor([[0, 2], [1, 2], [2, 0]]), 3)
    x, y, gate = torch.randn(3, 8), torch.randn(6, 8), torch.rand(3, 2)
    w = torch.randn(3, 8, 16)
    wanted = [t.clone().requires_grad_() for t in (x, y, gate, w)]
    return {
        "stickbreaking_attention": (q, k, k, start, mask, 0.5, 0.0),
        "stickbreaking_attention_rest": (q, k, k, start, mask, 0.5, 0.0, False),
        "stickbreaking_attention_backward": (grad.detach(), *plain, start, mask, 0.5, 0.0, torch.randn(1, 2, 5)),
        "stickbreaking_decode": (plain[0][:, :, 0], *plain[1:], torch.ones(1, dtype=torch.int64), mask, 0.5, 0.0),
        "stickbreaking_scan": (logits.clone().requires_grad_(), None),
        "stickbreaking_scan_backward": (torch.randn(2, 3, 4), logits, torch.ones(2, 3, dtype=torch.int32)),
        "sort_by_expert": (torch.tensor([[0, 2], [1, 2]]), 3),
        "permute": (wanted[0], order_R, inverse_R, 2),
        "permute_into": (x, order_R, inverse_R, 2, torch.empty(6, 8)),
        "unpermute": (wanted[1], order_R, inverse_R, wanted[2], 2),
        "unpermute_into": (y, order_R, inverse_R, gate, 2, torch.empty(3, 8)),
        "unpermute_backward": (torch.randn(3, 8), y, order_R, gate),
        "grouped_linear": (wanted[1], wanted[3], count_E),
        "grouped_linear_grad_w": (y, torch.randn(6, 16), count_E),
        "expert_products": (y, w, count_E),
        "expert_ffn": (
            x,
            torch.tensor([[0, 2], [1, 2], [2, 0]]),
            w,
            None,
            torch.randn(3, 16, 16),
            *([None] * 4),
            "relu",
        ),
        "expert_outer_products": (y, torch.randn(6, 16), count_E),
    }


def test_opcheck():
    for name, given in arguments().items():
        opcheck(getattr(OPS, name).default, given)


def test_public_functions_are_one_graph():
    """The sequence in two blocks of keys, combined, and one decoding step."""

    def run(q, k, v, start):
        old = stickbreaking_attention(q, k[:, :, :3], v[:, :, :3], causal=False, return_log_rem=True)
        new = stickbreaking_attention(q, k[:, :, 3:], v[:, :, 3:], start_BT=start, return_log_rem=True)
        o, _ = combine(*new, *old)
        return o, stickbreaking_decode(q[:, :, 0], k, v)

    start = document_starts(torch.tensor([0, 2, 4]), 1, 4)
    tensors = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (4, 7, 7)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        o, last = function(*tensors, start)
        results.append([o.detach(), last, *torch.autograd.grad(o.square().sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.fixture
def block():
    """A block with two heads and weights large enough that its routers decide."""
    made = Block(MODEL, LocalDispatcher())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    torch._dynamo.reset()
    return made


H_BTD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
START_BT = document_starts(torch.tensor([0, 4, 12]), 2, 6)


def test_a_block_is_one_graph(block):
    """Attention and MLP experts with documents: values, statistics and gradients."""
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y_BTD, *stats = run(H_BTD, START_BT)
        loss = y_BTD.square().mean() + sum(part.entropy for part in stats)
        results.append([y_BTD.detach(), *torch.autograd.grad(loss, list(block.parameters()))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_code_generator_takes_a_block(block):
    with torch.no_grad():
        expected = block(H_BTD, START_BT)[0]
        found = torch.compile(block, fullgraph=True, backend="inductor")(H_BTD, START_BT)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
