"""The CUDA sort, gather and combination, run on the host thread by thread, against plain Python and `naive.py`."""

import pytest
import torch

from megamf.ops.permutation import naive

LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
ROUTINGS = [
    ("random", 50, 2, 8),
    ("one expert", 9, 3, 4),
    ("even experts", 700, 3, 7),
    ("random", 0, 2, 3),
    ("random", 1, 1, 1),
    ("random", 1500, 1, 300),
]


def routing(kind: str, N: int, K: int, E: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * K + E)
    if kind == "one expert":
        return torch.full((N, K), E - 1)
    if kind == "even experts":
        return torch.randint(0, (E + 1) // 2, (N, K), generator=generator) * 2
    return torch.randint(0, E, (N, K), generator=generator)


@pytest.mark.parametrize(("kind", "N", "K", "E"), ROUTINGS)
def test_sort_is_stable(kernels, kind: str, N: int, K: int, E: int) -> None:
    flat = routing(kind, N, K, E).flatten().tolist()
    order, inverse, count = kernels.sort(torch.tensor(flat, dtype=torch.int64), E)
    want = sorted(range(N * K), key=lambda n: flat[n])  # Python's sort is stable
    assert order.tolist() == want
    assert [want[r] for r in inverse.tolist()] == list(range(N * K))
    assert count.tolist() == [flat.count(e) for e in range(E)]


def test_sort_with_so_many_experts_that_a_warp_fills_a_block(emulated_library) -> None:
    E = 12288
    flat = torch.randint(0, E, (70,), generator=torch.Generator().manual_seed(0))
    order, inverse, count = emulated_library.sort(flat, E)
    assert torch.equal(order, flat.argsort(stable=True)) and torch.equal(inverse, order.argsort())
    assert torch.equal(count, torch.bincount(flat, minlength=E))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("D", [1, 3, 8, 100, 520])
@pytest.mark.parametrize(("kind", "N", "K", "E"), [ROUTINGS[0], ROUTINGS[1], ROUTINGS[3]])
def test_rows_there_and_back(emulated_library, kind: str, N: int, K: int, E: int, D: int, dtype: torch.dtype) -> None:
    kernels = emulated_library
    generator = torch.Generator().manual_seed(D)
    x, y, grad = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (N, N * K, N))
    wide = torch.promote_types(dtype, torch.float32)
    gate = torch.rand(N, K, generator=generator, dtype=torch.float64).to(wide if D % 2 else dtype)
    order, inverse, _ = naive.sort_by_expert(routing(kind, N, K, E), E)
    assert torch.equal(kernels.permute(x, inverse, K), naive.permute(x, order, K))
    leaves = [t.double().requires_grad_() for t in (y, gate)]
    want = naive.unpermute(leaves[0], inverse, leaves[1])
    want_grads = torch.autograd.grad(want, leaves, grad.double())
    got = [kernels.unpermute(y, inverse, gate, K), *kernels.unpermute_backward(grad, y, order, gate)]
    plain = kernels.unpermute(y, inverse, None, K)
    ones = naive.unpermute(y.double(), inverse, torch.ones(N, K, dtype=torch.float64))
    for a, b in zip([*got, plain], [want, *want_grads, ones], strict=True):
        b = b.detach()
        limit = 3 * max(LIMITS[dtype], LIMITS[a.dtype])
        assert torch.isfinite(a).all() and float((a.double() - b).norm()) <= limit * float(b.norm())


def test_combination_is_summed_in_float32(emulated_library) -> None:
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert emulated_library.unpermute(y, torch.arange(3), torch.ones(1, 3), 3).item() == 258
