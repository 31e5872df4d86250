"""On a GPU: sorting by expert, gathering and combining of backend cuda against the specification."""

import pytest
import torch

from megamf.ops.permutation import naive, permute, sort_by_expert, unpermute

pytestmark = pytest.mark.gpu
LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
CASES = [
    ("random", 50, 2, 8),
    ("one expert", 9, 3, 4),
    ("even", 70000, 4, 33),
    ("random", 0, 2, 3),
    ("random", 1, 1, 1),
]


def routing(kind: str, N: int, K: int, E: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * K + E)
    if kind == "one expert":
        return torch.full((N, K), E - 1).cuda()
    if kind == "even":
        return (torch.randint(0, (E + 1) // 2, (N, K), generator=generator) * 2).cuda()
    return torch.randint(0, E, (N, K), generator=generator).cuda()


@pytest.mark.parametrize(("kind", "N", "K", "E"), CASES)
def test_sort(kind: str, N: int, K: int, E: int) -> None:
    expert = routing(kind, N, K, E)
    got, want = sort_by_expert(expert, E), naive.sort_by_expert(expert, E)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("D", [1, 100, 1024])
@pytest.mark.parametrize(("kind", "N", "K", "E"), [case for case in CASES if case[1] < 100])
def test_there_and_back_with_gradients(kind: str, N: int, K: int, E: int, D: int, dtype: torch.dtype) -> None:
    torch.manual_seed(D)
    x, factor, grad = (torch.randn(n, D, device="cuda", dtype=torch.float64).to(dtype) for n in (N, N * K, N))
    gate = torch.rand(N, K, device="cuda", dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    s = sort_by_expert(routing(kind, N, K, E), E)

    def step(backend: str, *leaves: torch.Tensor) -> list[torch.Tensor]:
        x, factor, gate, grad = (leaf.detach().requires_grad_() for leaf in leaves)
        rows = permute(x, s.order_R, s.inverse_R, K, backend=backend)
        y = unpermute(rows * factor, s.order_R, s.inverse_R, gate, backend=backend)
        return [rows.detach(), y.detach(), *torch.autograd.grad(y, (x, factor, gate), grad)]

    got, again = (step("cuda", x, factor, gate, grad) for _ in range(2))
    want = step("naive", *(t.double() for t in (x, factor, gate, grad)))
    assert torch.equal(got[0].double(), want[0])
    for a, b, c in zip(got, want, again, strict=True):
        assert torch.equal(a, c) and torch.isfinite(a).all()
        assert float((a.double() - b).norm()) <= 3 * LIMITS[dtype] * float(b.norm())


def test_nothing_waits_for_the_device() -> None:
    expert, x = routing("random", 1000, 2, 8), torch.randn(1000, 64, device="cuda")
    gate = torch.rand(1000, 2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        s = sort_by_expert(expert, 8)
        unpermute(permute(x, s.order_R, s.inverse_R, 2), s.order_R, s.inverse_R, gate)
    finally:
        torch.cuda.set_sync_debug_mode("default")
