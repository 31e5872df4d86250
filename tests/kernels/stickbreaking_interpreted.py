"""Stick-breaking attention in Triton under its interpreter, against the specification in float64.

Started by test_stickbreaking_kernels.py in a process of its own.
"""

import math

import pytest
import torch

from megamf.kernels import stickbreaking as kernels
from megamf.ops.stickbreaking import combine, document_starts, naive, stickbreaking_attention, stickbreaking_decode
from megamf.ops.stickbreaking import triton as glue

# Relative error (2-norm). The interpreter truncates to bfloat16 where the GPU rounds.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every uninitialised tensor is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)) if want.numel() else 0.0


def check(q, k, v, grad_o, grad_rem, *, limit=None, start=None, mask=None, causal=True, scale=None):
    """o, log_rem, dq, dk, dv of both; what nobody sees is NaN for the kernels."""
    (B, _, T, C), S = q.shape, k.shape[2]
    scale = C**-0.5 if scale is None else scale
    limit = LIMITS[q.dtype] if limit is None else limit
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    outputs = naive.attention_and_rest(*leaves, scale, start, mask, causal=causal)
    want = [*outputs, *torch.autograd.grad(outputs, leaves, (grad_o.double(), grad_rem.double()))]
    seen = naive.visible(T, S, start, mask, q.device, causal=causal).expand(B, T, S)
    blind, unseen = ~seen.any(2)[:, None, :, None], ~seen.any(1)[:, None, :, None]
    leaves = [x.masked_fill(nobody, math.nan).requires_grad_() for x, nobody in ((q, blind), (k, unseen), (v, unseen))]
    if q.dtype == torch.float16:  # the public function takes it on a GPU only
        outputs = glue.attention(*leaves, start, mask, scale, 0.0, causal)
    else:
        outputs = stickbreaking_attention(
            *leaves, scale=scale, start_BT=start, key_mask_BS=mask, causal=causal, stop=0.0, return_log_rem=True,
            backend="triton",
        )  # fmt: skip
    got = [*outputs, *torch.autograd.grad(outputs, leaves, (grad_o.masked_fill(blind, math.nan), grad_rem))]
    for name, a, b in zip(("o", "log_rem", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == (torch.float32 if name == "log_rem" else q.dtype)
        assert torch.isfinite(a).all(), name
        assert relative(a.detach(), b.detach()) < limit, (name, relative(a.detach(), b.detach()))


def make(B, H, G, T, S, C, dtype=torch.float32):
    shapes = (B, H, T, C), (B, G, S, C), (B, G, S, C), (B, H, T, C)
    return [*tensors(*shapes, seed=T + S, dtype=dtype), *tensors((B, H, T), seed=1)]


@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S", "C"),
    [
        (1, 1, 1, 1, 1, 3),
        (1, 2, 2, 17, 17, 16),
        (2, 2, 1, 17, 33, 40),
        (1, 6, 2, 33, 70, 16),
        (1, 2, 1, 70, 70, 3),
        (1, 1, 1, 17, 150, 130),
        (1, 1, 1, 1, 40, 16),
        (2, 1, 1, 0, 5, 16),
    ],
)
def test_values_and_gradients(B, H, G, T, S, C):
    check(*make(B, H, G, T, S, C))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "S", "C"), [(33, 150, 16), (5, 40, 200)])
def test_16_bits(dtype, T, S, C):
    check(*make(1, 4, 2, T, S, C, dtype), start=torch.randint(0, S, (1, T), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("lengths", [[33], [1] * 33, [0, 7, 0, 0, 1, 25, 0], [32, 1]])
def test_documents_empty_ones_and_single_tokens(lengths):
    T = sum(lengths)
    start = document_starts(torch.tensor([0, *lengths]).cumsum(0), 1, T)
    check(*make(1, 2, 1, T, T, 16), start=start)


@pytest.mark.parametrize(("T", "S", "causal"), [(33, 70, True), (70, 33, False), (33, 33, True), (5, 0, False)])
@pytest.mark.parametrize("masked", ["start", "mask", "both"])
def test_any_start_and_any_mask(T, S, causal, masked):
    generator = torch.Generator().manual_seed(T)
    start = None if masked == "mask" else torch.randint(0, S + 1, (2, T), generator=generator)
    mask = None if masked == "start" else torch.rand(2, S, generator=generator) > 0.4
    if mask is not None:
        mask[0, : S // 2] = False
    check(*make(2, 2, 1, T, S, 16), start=start, mask=mask, causal=causal)


@pytest.mark.parametrize("spread", [0.01, 5.0, 40.0])
def test_small_and_large_logits(spread):
    check(*make(1, 1, 1, 70, 70, 16), scale=spread / 4, limit=2e-6 * max(1.0, spread))


def test_a_long_row_comes_back_to_a_whole_stick():
    """The backward pass undoes the sums of 600 keys, of log_rem -400 and below."""
    check(*make(1, 1, 1, 2, 600, 16))


def test_exhausted_sticks_end_the_walk():
    q, k, v, grad_o, _ = make(1, 2, 1, 16, 600, 16)
    q[..., 0], k[..., 0] = 1.0, -6.0  # a stick lasts about 60 keys
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = naive.attention(*leaves, 0.7)
    want = [want, *torch.autograd.grad(want, leaves, grad_o.double())]
    k[:, :, :60], v[:, :, :60] = math.nan, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, log_rem = stickbreaking_attention(*leaves, scale=0.7, stop=1e-4, return_log_rem=True, backend="triton")
    got = [o, *torch.autograd.grad(o, leaves, grad_o)]
    assert float(log_rem.detach().max()) < math.log(1e-4)
    for a, b in zip(got, want, strict=True):
        a = a.detach()
        assert torch.isfinite(a).all()
        assert float((a.double() - b.detach()).abs().max()) < 2e-4 * 40
    assert not got[2][:, :, :60].any() and not got[3][:, :, :60].any()
    with_nan = stickbreaking_attention(*leaves, scale=0.7, stop=0.0, backend="triton")
    assert with_nan.isnan().any()


def test_rounds_of_rows_add_up(monkeypatch):
    arguments = make(1, 2, 1, 70, 70, 16)
    monkeypatch.setattr(kernels, "CARRY_BYTES", 1)
    check(*arguments, start=document_starts(torch.tensor([0, 30, 70]), 1, 70))


def test_layout_of_the_model_without_copies():
    B, T, K, G, C = 1, 20, 2, 2, 16
    q, kv, grad = tensors((B, T, K, G, C), (B, T, G, C), (B, K * G, T, C))
    leaves = [q.requires_grad_(), kv.requires_grad_()]

    def run(function):
        heads, keys = q.view(B, T, K * G, C).transpose(1, 2), kv.transpose(1, 2)
        o = function(heads, keys, keys)
        return [o.detach(), *torch.autograd.grad(o, leaves, grad)]

    got = run(lambda *x: stickbreaking_attention(*x, backend="triton"))
    want = run(lambda *x: stickbreaking_attention(*x, backend="naive"))
    assert got[0].stride() == q.view(B, T, K * G, C).transpose(1, 2).stride()
    assert all(relative(a, b) < 2e-6 for a, b in zip(got, want, strict=True))


def test_two_blocks_of_keys_combine_to_the_whole():
    T, S, cut = 20, 60, 40
    q, k, v, grad_o, grad_rem = make(1, 2, 1, T, S, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(outputs):
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, (grad_o, grad_rem))]

    options = {"return_log_rem": True, "backend": "triton"}
    new = stickbreaking_attention(q, k[:, :, cut:], v[:, :, cut:], **options)
    old = stickbreaking_attention(q, k[:, :, :cut], v[:, :, :cut], causal=False, **options)
    parts, whole = run(combine(*new, *old)), run(naive.attention_and_rest(q, k, v, 0.25))
    assert all(relative(a, b) < 2e-6 for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize(("programs", "limited"), [(1, True), (8, True), (512, False), (512, True)])
@pytest.mark.parametrize(("H", "G", "S", "C"), [(4, 2, 200, 16), (1, 1, 1, 3), (6, 2, 70, 40)])
def test_decoding(H, G, S, C, limited, programs, monkeypatch):
    monkeypatch.setattr(kernels, "DECODE_PROGRAMS", programs)
    q, k, v = tensors((2, H, C), (2, G, S, C), (2, G, S, C))
    start = torch.tensor([S // 3, S]) if limited else None
    mask = torch.rand(2, S, generator=torch.Generator().manual_seed(0)) > 0.3 if limited else None
    want = naive.decode(q.double(), k.double(), v.double(), 0.3, start, mask)
    if limited:
        k[1], v[1], q[1], k[0, :, : S // 3] = math.nan, math.nan, math.nan, math.nan
    got = stickbreaking_decode(q, k, v, scale=0.3, start_B=start, key_mask_BS=mask, stop=0.0, backend="triton")
    assert relative(got, want) < 2e-6
    assert not limited or not got[1].any()


def test_operators_are_sound_and_compile():
    q, k, v, grad_o, _ = make(1, 2, 1, 5, 8, 16)
    limits = glue.visibility(5, 8, torch.tensor([[0, 1, 1, 6, 2]]), None, True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        glue.attention_op, (*leaves, *limits, 0.3, 0.0, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(
        glue.decode_op, (q.detach()[:, :, 0], k.detach(), v.detach(), None, None, None, 0.3, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

    def run(q, k, v):
        return stickbreaking_attention(q, k, v, start_BT=torch.tensor([[0, 1, 1, 6, 2]]), backend="triton")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for function in (run, compiled):
        o = function(*leaves)
        found = [o.detach(), *torch.autograd.grad(o, leaves, grad_o)]
        expected = found if function is run else expected  # noqa: F821
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_kernels_do_not_have_is_refused():
    with pytest.raises(ValueError, match="257 channels, the Triton kernels take"):
        stickbreaking_attention(*make(1, 1, 1, 2, 2, 257)[:3], backend="triton")
    with pytest.raises(ValueError, match=r"torch.float64 and 16 channels"):
        stickbreaking_attention(*make(1, 1, 1, 2, 2, 16, torch.float64)[:3], backend="triton")
