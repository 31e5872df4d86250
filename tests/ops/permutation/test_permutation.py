"""The compiled permutation against the specification and against plain Python."""

from collections.abc import Iterator

import pytest
import torch

from megamf.ops.permutation import Sorted, into, naive, permute, sort_by_expert, unpermute

LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def routing(kind: str, N: int, K: int, E: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * K + E)
    if kind == "one expert":
        return torch.full((N, K), E - 1)
    if kind == "even experts only":
        return torch.randint(0, (E + 1) // 2, (N, K), generator=generator) * 2
    return torch.randint(0, E, (N, K), generator=generator)


CASES = [
    ("random", 50, 2, 8),
    ("one expert", 9, 3, 4),
    ("even experts only", 33, 1, 7),
    ("random", 0, 2, 3),
    ("random", 1, 1, 1),
]


@pytest.mark.parametrize("backend", ["csrc", "naive"])
@pytest.mark.parametrize(("kind", "N", "K", "E"), CASES)
def test_sort_is_stable(kind: str, N: int, K: int, E: int, backend: str) -> None:
    expert = routing(kind, N, K, E)
    got = sort_by_expert(expert, E, backend=backend)
    flat = expert.flatten().tolist()
    order = sorted(range(N * K), key=lambda n: flat[n])  # Python's sort is stable
    assert got.order_R.tolist() == order
    assert [order[r] for r in got.inverse_R.tolist()] == list(range(N * K))
    assert got.count_E.tolist() == [flat.count(e) for e in range(E)]
    assert all(x.dtype == torch.int64 for x in got)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("D", [1, 3, 64, 100])
@pytest.mark.parametrize(("kind", "N", "K", "E"), CASES)
def test_round_trip_with_gradients(kind: str, N: int, K: int, E: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(D)
    x, factor, grad = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (N, N * K, N))
    gate = torch.rand(N, K, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    s = sort_by_expert(routing(kind, N, K, E), E)

    def step(backend: str, *leaves: torch.Tensor) -> list[torch.Tensor]:
        x, factor, gate, grad = (leaf.detach().requires_grad_() for leaf in leaves)
        rows = permute(x, s.order_R, s.inverse_R, K, backend=backend)
        y = unpermute(rows * factor, s.order_R, s.inverse_R, gate, backend=backend)
        return [rows.detach(), y.detach(), *torch.autograd.grad(y, (x, factor, gate), grad)]

    got = step("csrc", x, factor, gate, grad)
    want = step("naive", *(t.double() for t in (x, factor, gate, grad)))
    assert torch.equal(got[0].double(), want[0])
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        assert float((a.double() - b).norm()) <= 3 * LIMITS[dtype] * float(b.norm())
    assert got[1].dtype == dtype and got[4].dtype == gate.dtype
    again = step("csrc", x, factor, gate, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("D", [257, 512])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_results_beyond_the_caches(dtype: torch.dtype, D: int) -> None:
    """Rows of whole cache lines are streamed to memory there, others are not."""
    N, K = 10_000, 2
    x, y = torch.randn(N, D).to(dtype), torch.randn(N * K, D).to(dtype)
    gate = torch.rand(N, K, dtype=torch.promote_types(dtype, torch.float32))
    s = sort_by_expert(routing("random", N, K, 8), 8)
    assert torch.equal(permute(x, s.order_R, s.inverse_R, K), naive.permute(x, s.order_R, K))
    got, want = unpermute(y, s.order_R, s.inverse_R, gate), naive.unpermute(y.double(), s.inverse_R, gate.double())
    assert float((got.double() - want).norm()) <= LIMITS[dtype] * float(want.norm())


def test_into_memory_that_is_there() -> None:
    s = sort_by_expert(routing("random", 50, 2, 8), 8)
    x, y, gate = torch.randn(50, 24), torch.randn(100, 24), torch.rand(50, 2)
    rows, combined = torch.full((100, 24), torch.nan), torch.full((50, 24), torch.nan)
    into.permute_into(x, s.order_R, s.inverse_R, 2, rows)
    into.unpermute_into(y, s.order_R, s.inverse_R, gate, 2, combined)
    assert torch.equal(rows, permute(x, s.order_R, s.inverse_R, 2))
    assert torch.equal(combined, unpermute(y, s.order_R, s.inverse_R, gate))
    for wrong in (rows[:-1], rows.double(), rows.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"out is .* expected contiguous Float \[100, 24\]"):
            into.permute_into(x, s.order_R, s.inverse_R, 2, wrong)
    with pytest.raises(ValueError, match=r"expected contiguous Float \[50, 24\]"):
        into.unpermute_into(y, s.order_R, s.inverse_R, gate, 2, rows)


def test_combination_is_summed_in_float32() -> None:
    """256 + 1 + 1 is 258 in float32; in bfloat16, term by term, it stays 256."""
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    identity = torch.arange(3)
    for backend in ("csrc", "naive"):
        out = unpermute(y, identity, identity, torch.ones(1, 3), backend=backend)
        assert out.dtype == torch.bfloat16 and out.item() == 258


def test_gradcheck() -> None:
    s = sort_by_expert(routing("random", 4, 2, 3), 3)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, s.order_R, s.inverse_R, 2), (x,))
    assert torch.autograd.gradcheck(lambda y, g: unpermute(y, s.order_R, s.inverse_R, g), (y, gate))


def test_opcheck() -> None:
    torch.use_deterministic_algorithms(False)
    expert = routing("random", 6, 2, 3)
    torch.library.opcheck(torch.ops.megamf.sort_by_expert, (expert, 3))
    s = sort_by_expert(expert, 3)
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    gate = torch.rand(6, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.megamf.permute, (x, s.order_R, s.inverse_R, 2))
    torch.library.opcheck(torch.ops.megamf.unpermute, (y, s.order_R, s.inverse_R, gate, 2))
    torch.library.opcheck(torch.ops.megamf.unpermute, (y, s.order_R, s.inverse_R, None, 2))
    plain = x.detach(), y.detach(), gate.detach()
    torch.library.opcheck(torch.ops.megamf.unpermute_backward, (*plain[:2], s.order_R, plain[2]))
    warm = x.detach(), s.order_R, s.inverse_R, 2, torch.empty(12, 4)
    torch.library.opcheck(torch.ops.megamf.permute_into, warm)
    warm = y.detach(), s.order_R, s.inverse_R, gate.detach(), 2, torch.empty(6, 4)
    torch.library.opcheck(torch.ops.megamf.unpermute_into, warm)


def test_indices_out_of_range_are_refused() -> None:
    with pytest.raises(IndexError, match="expert_NK holds 3"):
        sort_by_expert(torch.tensor([[0], [3]]), 3)
    with pytest.raises(IndexError, match="expert_NK holds -1"):
        sort_by_expert(torch.tensor([[-1]]), 3)
    with pytest.raises(IndexError, match="inverse_R holds 9, expected 0 to 1"):
        permute(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 9]), 1)
    for order, inverse in (([0, 9], [0, 1]), ([0, 1], [1, 0]), ([0, 1], [0, 0])):  # one is not the other's inverse
        with pytest.raises(IndexError, match=r"order_R holds \d at \d, where inverse_R puts \d"):
            permute(torch.zeros(2, 3), torch.tensor(order), torch.tensor(inverse), 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    s: Sorted = naive.sort_by_expert(torch.zeros(2, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="int64"):
        sort_by_expert(torch.zeros(2, 2, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="permute"):
        permute(torch.zeros(3, 2), s[0], s[1], 2)
    with pytest.raises(ValueError, match="unpermute"):
        unpermute(torch.zeros(4, 2), s[0], s[1], torch.zeros(3, 2))
