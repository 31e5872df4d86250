"""The compiled attention against the specification in float64: values and all gradients."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from megamf.ops.stickbreaking import (
    document_starts,
    naive,
    stickbreaking_attention,
    stickbreaking_decode,
    stickbreaking_scan,
)

# Relative error (2-norm) of values and of gradients.
LIMITS = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-6, 1e-5), torch.bfloat16: (4e-3, 4e-3)}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN, those of the C++ code too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    start: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scale: float = 1.0


def make(
    B: int, H: int, G: int, T: int, S: int, C: int, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> Case:
    generator = torch.Generator().manual_seed(B * H + G + T * S + C)
    q, k, v, grad = (
        torch.randn(B, n, t, C, generator=generator, dtype=torch.float64).to(dtype)
        for n, t in ((H, T), (G, S), (G, S), (H, T))
    )
    return Case(q, k, v, grad, scale=spread / math.sqrt(C))


def run(case: Case, **options) -> list[torch.Tensor]:
    """[o, dq, dk, dv] of the compiled kernels."""
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    o = stickbreaking_attention(
        *leaves, scale=case.scale, start_BT=case.start, key_mask_BS=case.mask, backend="csrc", **options
    )
    return [o.detach(), *torch.autograd.grad(o, leaves, case.grad)]


def expected(case: Case) -> list[torch.Tensor]:
    """The same of the specification, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (case.q, case.k, case.v)]
    o = naive.attention(*leaves, case.scale, case.start, case.mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, case.grad.double())]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0


def check(case: Case, **options) -> list[torch.Tensor]:
    got, want = run(case, **options), expected(case)
    value_limit, grad_limit = LIMITS[case.q.dtype]
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == case.q.dtype
        assert torch.isfinite(a).all(), name
        assert relative(a, b) < (value_limit if name == "o" else grad_limit), (name, relative(a, b))
    return got


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S", "C"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 2, 2, 64, 64, 64),
        (1, 1, 1, 1, 200, 16),
        (1, 4, 2, 65, 65, 3),
        (2, 2, 1, 63, 129, 65),
        (1, 6, 3, 100, 100, 1),
        (1, 2, 2, 130, 257, 128),
        (2, 2, 1, 70, 70, 256),
        (1, 8, 1, 33, 40, 20),
    ],
)
def test_values_and_gradients(B: int, H: int, G: int, T: int, S: int, C: int, dtype: torch.dtype) -> None:
    check(make(B, H, G, T, S, C, dtype))


@pytest.mark.parametrize("spread", [0.01, 5.0, 40.0])
@pytest.mark.parametrize("shift", [-30.0, -8.0, 0.0, 8.0])
def test_small_and_large_logits(spread: float, shift: float) -> None:
    """Sticks that are never touched, and sticks used up by one key."""
    case = make(1, 2, 1, 200, 200, 16, torch.float32, spread)
    # A common direction shifts every logit.
    case.q[..., 0] = 1.0
    case.k[..., 0] = shift / case.scale
    value_limit, grad_limit = 1e-5, 1e-4
    got, want = run(case, stop=0.0), expected(case)
    assert relative(got[0], want[0]) < value_limit
    # Where logits reach thousands, float32 logits themselves are off by 1e-4.
    assert all(relative(a, b) < grad_limit for a, b in zip(got[1:], want[1:], strict=True))


def test_a_long_row_of_tiny_shares_does_not_drift() -> None:
    """4096 shares of 3e-8, each below half an ulp of the stick: plain float32 would lose or double them all."""
    S = 4096
    q = torch.full((1, 1, 1, 1), 1.0)
    k = torch.full((1, 1, S, 1), math.log(3e-8))
    v = torch.linspace(0, 1, S).view(1, 1, S, 1)
    o = stickbreaking_attention(q, k, v, scale=1.0, stop=0.0)
    want = naive.attention(q.double(), k.double(), v.double(), 1.0)
    assert relative(o, want) < 1e-6
    for logit in (math.log(3e-8), math.log(1e-6), math.log(3e-3)):
        row = torch.full((1, S), logit)
        assert relative(stickbreaking_scan(row), naive.scan(row.double())) < 1e-6


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_documents(dtype: torch.dtype) -> None:
    """Empty and one-token documents, documents longer than a tile, a row boundary inside a document."""
    B, T = 2, 150
    case = make(B, 4, 2, T, T, 32, dtype)
    cu = torch.tensor([0, 0, 1, 2, 2, 90, 91, 170, 170, 300, 300])
    case.start = document_starts(cu, B, T)
    got = check(case)
    # No document sees another: each alone gives the same.
    for b, begin, end in ((0, 2, 90), (0, 91, 150), (1, 0, 20), (1, 20, 150)):
        rows = slice(begin, end)
        alone = Case(*(x[b : b + 1, :, rows] for x in (case.q, case.k, case.v, case.grad)), scale=case.scale)
        for whole, part in zip(got, run(alone), strict=True):
            assert relative(part, whole[b : b + 1, :, rows].double()) < max(LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_padding_with_holes_and_unsorted_starts(dtype: torch.dtype) -> None:
    case = make(3, 4, 2, 100, 140, 24, dtype)
    generator = torch.Generator().manual_seed(0)
    case.mask = torch.rand(3, 140, generator=generator) > 0.4
    case.mask[1] = True
    case.start = torch.randint(0, 141, (3, 100), generator=generator)
    check(case)
    case.start = None
    check(case)


def test_start_beyond_the_position_gives_exact_zeros() -> None:
    case = make(1, 2, 2, 70, 80, 16, torch.float32)
    case.start = torch.zeros(1, 70, dtype=torch.int32)
    case.start[0, 5] = 16
    case.start[0, 6] = 80
    case.start[0, 7] = 17  # exactly its own position: it sees itself alone
    o, dq, _, _ = check(case)
    assert (o[:, :, 5:7] == 0).all() and (dq[:, :, 5:7] == 0).all()
    assert (o[:, :, 7] != 0).all()
    case.start = torch.full((1, 70), 80)
    assert all((x == 0).all() for x in run(case))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_nobody_sees_may_be_nan(dtype: torch.dtype) -> None:
    case = make(2, 2, 2, 90, 90, 32, dtype)
    case.mask = torch.ones(2, 90, dtype=torch.bool)
    case.mask[0, 13:17] = False
    case.mask[1, -3:] = False
    case.start = torch.zeros(2, 90, dtype=torch.int64)
    case.start[1] = 20  # left padding: queries before 20 see nothing
    want = run(case)
    for x in (case.k, case.v):
        x[0, :, 13:17] = math.nan
        x[1, :, -3:] = math.nan
        x[1, :, :20] = math.nan
    case.q[1, :, :20] = math.nan
    case.grad[1, :, :20] = math.nan
    for a, b in zip(run(case), want, strict=True):
        assert torch.equal(a, b)


def test_nan_that_is_seen_is_not_hidden() -> None:
    case = make(1, 1, 1, 80, 80, 16, torch.float32)
    case.k[0, 0, 70] = math.nan
    o = stickbreaking_attention(case.q, case.k, case.v)
    assert torch.isnan(o[0, 0, 70:]).all()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("C", [16, 20])
def test_one_tensor_as_key_and_value(C: int, dtype: torch.dtype) -> None:
    case = make(2, 4, 1, 70, 75, C, dtype)
    q, kv = case.q.requires_grad_(), case.k.requires_grad_()
    got = torch.autograd.grad(stickbreaking_attention(q, kv, kv), (q, kv), case.grad)
    q64, kv64 = case.q.detach().double().requires_grad_(), case.k.detach().double().requires_grad_()
    want = torch.autograd.grad(naive.attention(q64, kv64, kv64, C**-0.5), (q64, kv64), case.grad.double())
    assert all(relative(a, b) < 2 * LIMITS[dtype][1] for a, b in zip(got, want, strict=True))


def test_strides_of_the_model_are_taken_and_kept() -> None:
    """q is a view [B, T, K*G, C] -> [B, K*G, T, C]; k and v are slices of one projection; grad is expanded."""
    B, T, H, G, C = 2, 70, 4, 2, 16
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(B, T, H, C, generator=generator).transpose(1, 2)
    kv = torch.randn(B, T, 2 * G * C, generator=generator)
    k, v = (x.view(B, T, G, C).transpose(1, 2) for x in kv.split(G * C, dim=-1))
    case = Case(q, k, v, torch.ones(()).expand(B, H, T, C), scale=0.25)
    got = check(case)
    assert got[0].stride() == q.stride()
    odd = Case(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)), case.grad, scale=0.25)
    for a, b in zip(run(odd), got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_same_bits_every_time_and_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case = make(1, 2, 1, 200, 230, 48, dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 1, 2, 2, 3):
            torch.set_num_threads(n)
            runs.append(run(case))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_stopping_early_keeps_its_error_bound() -> None:
    case = make(1, 2, 2, 300, 300, 32, torch.float64)
    full = run(case, stop=0.0)
    assert all(relative(a, b) < 1e-12 for a, b in zip(run(case), full, strict=True))  # the default changes nothing
    stop = 1e-4
    early = run(case, stop=stop)
    error = (early[0] - full[0]).abs().max()
    assert 0 < error <= stop * case.v.abs().max()
    g_max = (case.grad @ case.v.mT).abs().max()
    k_sum = case.k.abs().sum(2).max()
    assert 0 < (early[1] - full[1]).abs().max() <= 2 * stop * g_max * case.scale * k_sum


def test_gradcheck_of_the_compiled_kernels() -> None:
    case = make(1, 2, 1, 5, 6, 2)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(lambda *x: stickbreaking_attention(*x, stop=0.0), leaves)


def test_opcheck_and_one_graph() -> None:
    torch.use_deterministic_algorithms(False)
    for dtype in (torch.float32, torch.bfloat16):
        case = make(1, 2, 1, 10, 12, 8, dtype)
        start = torch.full((1, 10), 2)
        mask = torch.ones(1, 12, dtype=torch.bool)
        leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        torch.library.opcheck(torch.ops.megamf.stickbreaking_attention, (*leaves, start, mask, 0.5, 0.0))
        plain = [x.detach() for x in leaves]
        torch.library.opcheck(
            torch.ops.megamf.stickbreaking_decode, (plain[0][:, :, 0], *plain[1:], None, mask, 0.5, 0.0)
        )
    compiled = torch.compile(stickbreaking_attention, fullgraph=True, backend="aot_eager")
    case = make(1, 2, 1, 10, 12, 8, torch.float32)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    o = compiled(*leaves, scale=case.scale)
    grads = torch.autograd.grad(o, leaves, case.grad)
    assert all(torch.equal(a, b) for a, b in zip((o, *grads), run(case), strict=True))


@pytest.mark.parametrize("empty", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 0, 0)])
def test_nothing_to_do(empty: tuple[int, int, int, int]) -> None:
    B, H, T, S = empty
    o, dq, dk, dv = run(make(B, H, H, T, S, 4, torch.float32))
    assert o.shape == dq.shape == (B, H, T, 4)
    assert (dk == 0).all() and (dv == 0).all() and dk.shape == (B, H, S, 4)


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """T = 8192, 4 heads: a T x S matrix would take 1 GiB; inputs, outputs and gradients take 64 MiB."""
    code = """
import resource, torch
from megamf.ops.stickbreaking import stickbreaking_attention
torch.set_num_threads(2)
def step(T):
    q, k, v = (torch.randn(1, 4, T, 64, requires_grad=True) for _ in range(3))
    torch.autograd.grad(stickbreaking_attention(q, k, v), (q, k, v), torch.randn(1, 4, T, 64))
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) / 1024 < 4 * 64


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("H", "G", "S", "C"), [(1, 1, 1, 1), (4, 2, 200, 64), (2, 1, 65, 70), (3, 3, 64, 5)])
def test_decode(H: int, G: int, S: int, C: int, dtype: torch.dtype) -> None:
    case = make(2, H, G, 1, S, C, dtype)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, S, generator=generator) > 0.3
    k, v = case.k, case.v
    k.masked_fill_(~mask[:, None, :, None], math.nan)
    v.masked_fill_(~mask[:, None, :, None], math.nan)
    for start in (None, torch.tensor([0, S // 2]), torch.tensor([S, 1])):
        got = stickbreaking_decode(case.q[:, :, 0], k, v, start_B=start, key_mask_BS=mask, backend="csrc")
        want = naive.decode(case.q[:, :, 0].double(), k.double(), v.double(), C**-0.5, start, mask)
        assert torch.isfinite(got).all() and relative(got, want) < LIMITS[dtype][0]
        assert not got.requires_grad


def test_decode_agrees_with_the_last_query() -> None:
    case = make(2, 4, 2, 90, 90, 32, torch.float32)
    whole = stickbreaking_attention(case.q, case.k, case.v)
    torch.testing.assert_close(stickbreaking_decode(case.q[:, :, -1], case.k, case.v), whole[:, :, -1])


def test_document_starts() -> None:
    assert document_starts(torch.tensor([0, 3, 3, 8, 12]), 2, 6).tolist() == [[0, 0, 0, 3, 3, 3], [0, 0, 2, 2, 2, 2]]
    assert document_starts(torch.tensor([0, 4]), 1, 4).dtype == torch.int32
    assert document_starts(torch.tensor([0]), 0, 4).shape == (0, 4)


@pytest.mark.parametrize("cu", [[0, 3], [1, 12], [0, 5, 4, 12], [0.0, 12.0], [[0, 12]]])
def test_document_starts_refuses(cu: list) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        document_starts(torch.tensor(cu), 2, 6)


def test_wrong_arguments_are_named() -> None:
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    wrong = [
        ((q, k, k[:, :1]), {}, "expected"),
        ((q, k[:, :, :2], k[:, :, :2]), {}, "T <= S"),
        ((q[:, :3], k, k), {}, "multiple of G"),
        ((q, k.double(), k), {}, "dtype|expected one of"),
        ((q.half(), k.half(), k.half()), {}, "float16"),
        ((q, k, k), {"start_BT": torch.zeros(1, 3)}, "int32 or int64"),
        ((q, k, k), {"start_BT": torch.zeros(1, 2, dtype=torch.int64)}, "start"),
        ((q, k, k), {"key_mask_BS": torch.ones(1, 3)}, "bool"),
        ((q, k, k), {"stop": -1.0}, "stop"),
        ((q, k, k), {"backend": "metal"}, "does not exist"),
    ]
    for tensors, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            stickbreaking_attention(*tensors, **options)
