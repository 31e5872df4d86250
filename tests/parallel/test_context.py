"""Sequences split over ranks: who holds what, the work of each, and attention over parts against the whole."""

import gc
import math
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megamf.data.zigzag import chunk_indices, join_parts, take_part
from megamf.model import ModuleFormer
from megamf.ops.stickbreaking import naive
from megamf.parallel import context
from megamf.parallel.context import SplitContext, by_rank, in_sequence, own_keys, with_older


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_parts_are_a_partition_and_join_to_the_whole(num_ranks):
    x_BT = torch.arange(2 * 24).view(2, 24)
    parts = [take_part(x_BT, rank, num_ranks) for rank in range(num_ranks)]
    assert all(part.shape == (2, 24 // num_ranks) for part in parts)
    assert torch.equal(join_parts(parts), x_BT)
    assert sorted(index for rank in range(num_ranks) for index in chunk_indices(rank, num_ranks)) == list(
        range(2 * num_ranks if num_ranks > 1 else 1)
    )


def test_a_part_is_an_early_and_a_late_chunk():
    assert take_part(torch.arange(12)[None], 0, 3).tolist() == [[0, 1, 10, 11]]
    assert take_part(torch.arange(12)[None], 2, 3).tolist() == [[4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"12 tokens .* 2 x 4"):
        take_part(torch.arange(12)[None], 0, 4)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_gathered_rows_find_their_place(num_ranks):
    x_SX = random(24, 5)
    gathered = torch.cat([take_part(x_SX[None], rank, num_ranks)[0] for rank in range(num_ranks)])
    assert torch.equal(in_sequence(gathered, num_ranks), x_SX)
    assert torch.equal(by_rank(x_SX, num_ranks), gathered)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_every_rank_visits_the_same_number_of_keys(num_ranks):
    """Counted query by query; contiguous parts would leave the last rank almost twice the mean."""
    T = 64
    position_BT = torch.arange(T)[None]
    visited = [int((take_part(position_BT, rank, num_ranks) + 1).sum()) for rank in range(num_ranks)]
    assert set(visited) == {T * (T + 1) // 2 // num_ranks}
    last = position_BT.chunk(num_ranks, dim=1)[-1] + 1
    assert last.sum() > 1.4 * visited[0]


def split_attention(q, k, v, start, num_ranks, backend):
    """What `SplitContext.attend` does on every rank, with the gathered keys at hand."""
    U = q.shape[2] // (2 * num_ranks)
    parts = []
    for rank in range(num_ranks):
        chunks = []
        for index in chunk_indices(rank, num_ranks):
            rows = slice(index * U, (index + 1) * U)
            start_BU = None if start is None else start[:, rows]
            own = own_keys(q[:, :, rows], k[:, :, rows], v[:, :, rows], start_BU, index * U, backend)
            older = k[:, :, : index * U], v[:, :, : index * U]
            chunks.append(with_older(q[:, :, rows], *own, *older, start_BU, backend))
        parts.append(torch.cat(chunks, dim=2).transpose(1, 2))
    return join_parts(parts).transpose(1, 2)


@pytest.mark.parametrize("backend", ["naive", "csrc"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("num_ranks", "G", "H", "T"), [(2, 1, 2, 8), (2, 2, 4, 96), (3, 2, 2, 18), (4, 1, 3, 160)])
def test_parts_attend_as_the_whole(num_ranks, G, H, T, documents, dtype, limit, backend):
    B, C = 2, 6
    tensors = [random(B, H, T, C), random(B, G, T, C, seed=1), random(B, G, T, C, seed=2), random(B, H, T, C, seed=3)]
    q, k, v, grad = (x.to(dtype) for x in tensors)
    start = None
    if documents:
        # Boundaries inside chunks and on them, and a document of the whole sequence.
        first_T = torch.arange(T) // max(1, T // 5) * max(1, T // 5)
        start = torch.stack([first_T, torch.zeros(T, dtype=torch.long)]).int()
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    want = naive.attention(*wide, C**-0.5, start)
    wanted = [want.detach(), *torch.autograd.grad(want, wide, grad.double())]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = split_attention(*leaves, start, num_ranks, backend)
    assert got.dtype == dtype
    for name, a, b in zip(("o", "dq", "dk", "dv"), [got.detach(), *torch.autograd.grad(got, leaves, grad)], wanted):
        error = (a.double() - b).norm() / b.norm()
        assert error < limit, f"{name}: relative error {error:.2e}"


class Threads:
    """Stands in for torch.distributed: the ranks are threads of this process, and every collective is asynchronous."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.mine = threading.local()
        self.count = [0] * num_ranks
        self.posted = defaultdict(dict)
        self.news = threading.Condition()

    def get_world_size(self, group):
        return self.num_ranks

    def get_rank(self, group):
        return self.mine.rank

    def all_gather_into_tensor(self, output, given, group, async_op):
        assert async_op and output.is_contiguous() and given.is_contiguous()
        return self._begin(given, lambda shares: output.copy_(torch.cat(shares)))

    def reduce_scatter_tensor(self, output, given, group, async_op):
        assert async_op and output.is_contiguous() and given.is_contiguous()
        rank = self.mine.rank
        return self._begin(
            given, lambda shares: output.copy_(sum(share.chunk(self.num_ranks)[rank] for share in shares))
        )

    def _begin(self, given, finish):
        rank = self.mine.rank
        with self.news:
            self.count[rank] += 1
            number = self.count[rank]
            self.posted[number][rank] = given.clone()
            self.news.notify_all()

        def wait():
            with self.news:
                assert self.news.wait_for(lambda: len(self.posted[number]) == self.num_ranks, timeout=60)
                finish([self.posted[number][r] for r in range(self.num_ranks)])

        return SimpleNamespace(wait=wait)

    def run(self, work):
        """[work(rank) for every rank], at the same time."""

        def one(rank):
            self.mine.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.num_ranks) as pool:
            return [future.result() for future in [pool.submit(one, rank) for rank in range(self.num_ranks)]]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("backend", ["naive", "csrc"])
def test_ranks_together_attend_as_one(monkeypatch, num_ranks, shared, recomputed, backend):
    """Values and gradients; and the keys of the whole sequence are kept between the passes only where they must be."""
    B, H, G, T, C = 2, 4, 2, 12 * num_ranks, 3
    q, k, v, grad = (
        random(B, H, T, C),
        random(B, G, T, C, seed=1),
        random(B, G, T, C, seed=2),
        random(B, H, T, C, seed=3),
    )
    start = torch.stack([torch.arange(T) // 10 * 10, torch.zeros(T, dtype=torch.long)]).int()
    leaves = [x.clone().requires_grad_() for x in ((q, k) if shared else (q, k, v))]
    want = naive.attention(leaves[0], leaves[1], leaves[-1], C**-0.5, start)
    wanted = [want.detach(), *torch.autograd.grad(want, leaves, grad)]

    threads, wholes, passed = Threads(num_ranks), [], {}

    def noted(*arguments):
        whole = in_sequence(*arguments)
        wholes.append(StorageWeakRef(whole.untyped_storage()))
        return whole

    monkeypatch.setattr(context, "dist", threads)
    monkeypatch.setattr(context, "in_sequence", noted)

    def part(x_BHTC, rank):
        return take_part(x_BHTC.transpose(1, 2), rank, num_ranks).transpose(1, 2)

    def forward(rank):
        split = SplitContext(None, recomputed=recomputed)
        mine = [part(x.detach(), rank).requires_grad_() for x in leaves]
        keys = split.share(mine[1], mine[-1])
        o = split.attend(mine[0], keys, take_part(start, rank, num_ranks), None, backend)
        return mine, split.before_backward(o, keys)

    def backward(rank):
        mine, o = passed.pop(rank)
        return [o.detach(), *torch.autograd.grad(o, mine, part(grad, rank))]

    gc.disable()
    try:
        passed.update(enumerate(threads.run(forward)))
        # The naive backend saves what it makes of the keys, not the keys.
        let_go = not recomputed and backend == "csrc"
        assert len(wholes) == num_ranks
        assert not let_go or all(whole.expired() for whole in wholes)
        found = threads.run(backward)
        assert len(wholes) == (2 * num_ranks if let_go else num_ranks)
        assert all(whole.expired() for whole in wholes), "nothing keeps itself alive"
    finally:
        gc.enable()
    for wanted_BHTC, parts in zip(wanted, zip(*found), strict=True):
        joined = join_parts([x.transpose(1, 2) for x in parts]).transpose(1, 2)
        torch.testing.assert_close(joined, wanted_BHTC, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("documents", [False, True])
def test_parts_attend_as_the_whole_on_a_gpu(documents, backend):
    B, G, H, T, C, num_ranks = 2, 1, 4, 1024, 64, 4
    q, k, grad = (random(B, n, T, C, seed=n).float().cuda() for n in (H, G, H))
    start = (torch.arange(T, device="cuda") // 300 * 300).int().expand(B, T).contiguous() if documents else None
    found = []
    for attend in (
        lambda q, k: naive.attention(q, k, k, C**-0.5, start),
        lambda q, k: split_attention(q, k, k, start, num_ranks, backend),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        o = attend(*leaves)
        found.append([o.detach(), *torch.autograd.grad(o, leaves, grad)])
    for wanted, got in zip(*found):
        assert (got - wanted).norm() / wanted.norm() < 5e-3  # TF32 products in the kernels' gradients


def test_queries_whose_stick_is_used_up_see_no_older_keys(monkeypatch):
    """Within the threshold nothing changes, and the kernels are told that there is nothing to visit."""
    B, H, T, C = 1, 2, 256, 8
    q, k = random(B, H, T, C).float() * 0.1, random(B, 1, T, C, seed=1).float() * 0.1
    # The last quarter of the queries has its stick used up by its own chunk, in every head.
    q[:, :, 192:], k[:, :, 192:] = 8.0, 8.0
    told = []
    attention = context.stickbreaking_attention

    def note(*arguments, **options):
        if not options.get("causal", True):
            told.append(options["start_BT"])
        return attention(*arguments, **options)

    monkeypatch.setattr(context, "stickbreaking_attention", note)
    got = split_attention(q, k, k, None, 2, "csrc")
    starts = {start.shape[1]: start for start in told}
    assert len(told) == 3 and set(starts) == {64}
    blind = [bool((start == first).all()) for start, first in zip(told, (192, 64, 128))]
    assert blind == [True, False, False]
    want = naive.attention(q.double(), k.double(), k.double(), C**-0.5)
    assert float((got - want).abs().max()) < 1e-5


class TwoRanks:
    """A context that says only over how many ranks it is."""

    num_ranks = 2


@pytest.mark.parametrize(("what", "message"), [("cache", "history"), ("key_mask_BS", "key mask")])
def test_what_split_sequences_cannot_have_is_refused(make_small_config, what, message):
    model = ModuleFormer(make_small_config, context=TwoRanks())
    given = model.new_cache() if what == "cache" else torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"split over 2 ranks .*{message}.*parallel.context=1"):
        model(torch.zeros(1, 4, dtype=torch.long), **{what: given})


@pytest.fixture
def make_small_config():
    from megamf.config import ModelConfig

    sizes = {"vocab_size": 7, "n_layer": 1, "n_embd": 8, "att_hidden": 8, "ffd_hidden": 8, "gating_size": 4}
    return ModelConfig(**sizes, n_att_experts=4, n_mlp_experts=4)


def test_stop_is_a_length_of_the_stick():
    """The threshold that ends a walk is compared with logarithms here."""
    q = torch.full((1, 1, 8, 1), 30.0)
    _, log_rem = own_keys(q, torch.ones(1, 1, 8, 1), torch.ones(1, 1, 8, 1), None, 0, "csrc")
    assert (log_rem <= math.log(context.DEFAULT_STOP[torch.float32])).all()
