"""What is left of the stick, queries behind all keys, and blocks of keys combined, against one whole in float64."""

import itertools
import math

import pytest
import torch

from megamf.ops.stickbreaking import combine, naive, stickbreaking_attention

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def tensors(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def with_gradients(outputs: tuple, leaves: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def test_the_specification_is_the_product_of_what_each_key_leaves() -> None:
    q, k = tensors((1, 1, 3, 2), (1, 1, 5, 2))
    mask = torch.tensor([[True, True, False, True, True]])
    _, log_rem = naive.attention_and_rest(q, k, k, 0.5, torch.tensor([[1, 0, 5]]), mask)
    for t, keys in enumerate([[1], [0, 1, 3], []]):
        left = 1.0
        for j in keys:
            left *= 1 - 1 / (1 + math.exp(-0.5 * float(q[0, 0, t] @ k[0, 0, j])))
        assert log_rem[0, 0, t].item() == pytest.approx(math.log(left), abs=1e-14)
    assert naive.attention_and_rest(q.bfloat16(), k.bfloat16(), k.bfloat16(), 0.5)[1].dtype == torch.float32


@pytest.mark.parametrize("causal", [True, False])
def test_specification_gradients_are_finite_differences(causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2)))
    start = torch.tensor([[0, 3, 1]])
    assert torch.autograd.gradcheck(
        lambda *x: naive.attention_and_rest(*x, 0.6, start, causal=causal), (q, k, v), atol=1e-7
    )


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S", "C", "causal"),
    [
        (1, 1, 1, 1, 1, 1, True),
        (2, 4, 2, 70, 130, 20, True),
        (2, 2, 1, 128, 128, 64, True),
        (2, 4, 2, 70, 130, 20, False),
        (1, 2, 2, 130, 33, 16, False),
        (1, 1, 1, 64, 64, 8, False),
        (2, 2, 1, 5, 0, 4, False),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_compiled_is_the_specification(
    B: int, H: int, G: int, T: int, S: int, C: int, causal: bool, documents: bool, dtype: torch.dtype
) -> None:
    shapes = [(B, H, T, C), (B, G, S, C), (B, G, S, C), (B, H, T, C), (B, H, T)]
    q, k, v, grad_o, grad_rem = tensors(*shapes, seed=T, dtype=dtype)
    grad_rem = grad_rem.to(torch.promote_types(dtype, torch.float32))
    generator = torch.Generator().manual_seed(S)
    start = torch.randint(0, S + 1, (B, T), generator=generator) if documents else None
    mask = torch.rand(B, S, generator=generator) > 0.3 if documents else None
    options = {"start_BT": start, "key_mask_BS": mask, "causal": causal, "return_log_rem": True}
    wide = [x.double().clone().requires_grad_() for x in (q, k, v)]
    want = with_gradients(
        stickbreaking_attention(*wide, **options, backend="naive"), wide, [grad_o.double(), grad_rem.double()]
    )
    seen = naive.visible(T, S, start, mask, q.device, causal=causal).expand(B, T, S)
    blind, unseen = ~seen.any(2), ~seen.any(1)
    # What nobody sees may hold NaN, in the gradients too.
    q.masked_fill_(blind[:, None, :, None], math.nan)
    k.masked_fill_(unseen[:, None, :, None], math.nan)
    v.masked_fill_(unseen[:, None, :, None], math.nan)
    grad_rem.masked_fill_(blind[:, None, :], math.nan)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outputs = stickbreaking_attention(*leaves, **options, backend="csrc")
    got = with_gradients(outputs, leaves, [grad_o, grad_rem])
    assert got[0].dtype == dtype and got[1].dtype == grad_rem.dtype
    assert all(torch.isfinite(x).all() for x in got)
    assert (got[1].masked_select(blind[:, None].expand(B, H, T)) == 0).all()
    for name, a, b in zip(("o", "log_rem", "dq", "dk", "dv"), got, want, strict=True):
        assert relative(a, b) < LIMITS[dtype], name


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-15), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("logit", [-60.0, -8.0, 0.0, 8.0, 60.0, 600.0])
def test_log_rem_is_right_however_long_or_short_the_stick(logit: float, dtype: torch.dtype, limit: float) -> None:
    """Every key takes sigmoid(logit): after n keys n * log(1 - sigmoid(logit)), far below the smallest float."""
    T = 500
    q, k = torch.full((1, 1, T, 1), logit, dtype=dtype), torch.ones(1, 1, T, 1, dtype=dtype)
    _, log_rem = stickbreaking_attention(q, k, k, scale=1.0, return_log_rem=True, backend="csrc")
    want = torch.arange(1, T + 1, dtype=torch.float64) * torch.nn.functional.logsigmoid(torch.tensor(-logit).double())
    torch.testing.assert_close(log_rem[0, 0].double(), want, rtol=3 * limit, atol=0)


def test_a_walk_that_stops_leaves_at_most_the_threshold() -> None:
    q, k, v = tensors((1, 2, 400, 16), (1, 2, 400, 16), (1, 2, 400, 16), dtype=torch.float32)
    _, exact = stickbreaking_attention(q, k, v, return_log_rem=True)
    o, stopped = stickbreaking_attention(q, k, v, return_log_rem=True, stop=1e-6)
    assert float(exact.min()) < -100 and (stopped >= exact - 1e-4).all()
    ended = stopped > exact + 1
    assert ended.any() and (stopped[ended] <= math.log(1e-6)).all()
    combined, _ = combine(o, stopped, v[:, :, :400], torch.zeros_like(stopped))
    torch.testing.assert_close(combined, combine(o, exact, v, torch.zeros_like(exact))[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["naive", "csrc"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
@pytest.mark.parametrize("cuts", [[0, 64, 150], [0, 20, 100, 150]])
def test_blocks_of_keys_combine_to_the_whole(cuts: list[int], dtype: torch.dtype, limit: float, backend: str) -> None:
    """Each stretch of queries attends to its own keys causally and to the older stretches without causality."""
    B, H, G, T, C = 2, 4, 2, cuts[-1], 16
    q, k, v, grad_o, grad_rem = tensors((B, H, T, C), (B, G, T, C), (B, G, T, C), (B, H, T, C), (B, H, T), seed=1)
    q = q * 0.3
    start = torch.tensor([[0] * 70 + [70] * (T - 70), [0] * 10 + [10] * (T - 10)])
    wide = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = naive.attention_and_rest(*wide, C**-0.5, start)
    want = with_gradients(whole, wide, [grad_o, grad_rem])

    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    outputs = []
    blocks = list(itertools.pairwise(cuts))
    for n, (begin, end) in enumerate(blocks):
        parts = [
            stickbreaking_attention(
                q[:, :, begin:end],
                k[:, :, a:b],
                v[:, :, a:b],
                start_BT=(start[:, begin:end] - a).clamp(0, b - a),
                causal=a == begin,
                return_log_rem=True,
                backend=backend,
            )
            for a, b in blocks[n::-1]
        ]
        total = parts[0]
        for older in parts[1:]:
            total = combine(*total, *older)
        if len(parts) == 3:  # any grouping
            other = combine(*parts[0], *combine(*parts[1], *parts[2]))
            assert all(relative(x.detach(), y.detach()) < limit for x, y in zip(total, other, strict=True))
        outputs.append(total)
    joined = tuple(torch.cat([pair[i] for pair in outputs], dim=2) for i in (0, 1))
    got = with_gradients(joined, leaves, [grad_o.to(dtype), grad_rem.to(dtype)])
    for name, a, b in zip(("o", "log_rem", "dq", "dk", "dv"), got, want, strict=True):
        assert relative(a, b) < limit, name


def test_combine_keeps_the_type_of_the_output() -> None:
    o = torch.randn(1, 1, 2, 4).bfloat16()
    log_rem = torch.tensor([[[0.0, -math.inf]]])
    got, left = combine(o, log_rem, o, log_rem)
    assert got.dtype == torch.bfloat16 and left.dtype == torch.float32
    torch.testing.assert_close(got[0, 0, 0], 2 * o[0, 0, 0])
    torch.testing.assert_close(got[0, 0, 1], o[0, 0, 1])


def test_wrong_shapes_are_named() -> None:
    o, rem = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"combine got .*\(1, 2, 3, 4\)"):
        combine(o, rem, o, rem[:, :1])
    with pytest.raises(ValueError, match="T <= S"):
        stickbreaking_attention(o, o[:, :, :2], o[:, :, :2])
    assert stickbreaking_attention(o, o[:, :, :2], o[:, :, :2], causal=False).shape == o.shape


def test_compiled_operation_traces() -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 6, 4), (1, 1, 4, 4), (1, 1, 4, 4), dtype=torch.float32))
    arguments = (q, k, v, None, torch.ones(1, 4, dtype=torch.bool), 0.5, 0.0, False)
    torch.library.opcheck(torch.ops.megamf.stickbreaking_attention_rest, arguments)
