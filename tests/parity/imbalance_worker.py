"""One rank of the imbalance tests: layouts through scenarios, collectives counted, dispatchers without tokens.

Run as `python imbalance_worker.py OUT WORK_JSON` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from imbalance_cases import STEPS, B, T, global_batch, share

from megamf.callbacks.checkpointing import Checkpointing
from megamf.callbacks.hottest import hottest_rank, take_peak_rows
from megamf.checkpoint import Checkpoint
from megamf.config import RunConfig, validate
from megamf.data.loader import MicroBatch
from megamf.model.dispatch import LocalDispatcher
from megamf.parallel.dispatch import AllToAllDispatcher, GatheringDispatcher
from megamf.parallel.launch import identify, process_group
from megamf.parallel.mesh import create_mesh
from megamf.parallel.state import load_state
from megamf.trainer import Trainer


def through_scenarios(out: Path, config: RunConfig, starts: dict[str, str]) -> dict[str, Any]:
    """From each start the same steps, then a checkpoint; what was seen on the way."""
    rank, world = dist.get_rank(), dist.get_world_size()
    trainer = Trainer(config, loader=None)
    seen = {}
    for scenario, start in starts.items():
        with Checkpoint(start) as checkpoint:
            load_state(trainer.engine, checkpoint, 0)
        trainer.step = trainer.consumed = 0
        take_peak_rows(trainer)
        results = [trainer.train_step([share(global_batch(scenario, step), rank, world)]) for step in range(STEPS)]
        saving = Checkpointing(config.model_copy(update={"run": config.run.model_copy(update={"dir": out / scenario})}))
        saving.save(trainer)
        own_rows = max(dispatcher.peak_rows for dispatcher in trainer.dispatchers)
        everyone = [torch.tensor(0) for _ in range(world)]
        dist.all_gather(everyone, torch.tensor(own_rows))
        seen[scenario] = {
            "skipped": [result.skipped for result in results],
            "loss": [result.loss for result in results],
            "aux_loss": [result.aux_loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "peak_rows": torch.stack(everyone).tolist(),
            "hottest": hottest_rank(trainer),
            "left": take_peak_rows(trainer),
        }
    return seen


@contextmanager
def counted() -> Iterator[Counter]:
    """How often megamf's own modules (not the engine's) call each collective of torch.distributed."""
    calls: Counter = Counter()
    names = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather")
    real = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("megamf."):
                calls[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def collectives_of_a_step(config: RunConfig) -> dict[str, int]:
    """The calls of one step of random tokens."""
    trainer = Trainer(config, loader=None)
    batches = []
    for i in range(trainer.accumulation):
        generator = torch.Generator().manual_seed(10 * i + dist.get_rank())
        token_BT = torch.randint(61, (config.train.micro_batch, T + 1), generator=generator)
        batches.append(MicroBatch(token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous(), None))
    with counted() as calls:
        trainer.train_step(batches)
    return dict(calls)


def errors_of_dispatch(num_tokens: list[int]) -> dict[str, float]:
    """Two products with given numbers of tokens a rank (cyclic), against all of them in one process, in float64."""
    D, hidden, E, K, P = 6, 5, 8, 2, dist.get_world_size()
    mesh = create_mesh(P)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    whole = [randn(E, D, hidden), randn(E, hidden, D)]
    tokens = [num_tokens[rank % len(num_tokens)] for rank in range(P)]
    choices = [torch.rand(n, E, generator=generator).topk(K).indices for n in tokens]
    inputs = [(randn(n, D), randn(n, K), randn(n, D)) for n in tokens]

    def run(dispatcher: Any, parts: list[int], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        x_ND, gate_NK, grad_ND = (torch.cat([inputs[part][i] for part in parts]) for i in range(3))
        leaves = [x_ND.requires_grad_(), gate_NK.requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        plan = dispatcher.plan(torch.cat([choices[part] for part in parts]), E)
        h_RF = dispatcher.linear(dispatcher.dispatch(x_ND, plan), leaves[2], plan, "auto")
        # There and back by copies, as an attention layer does between its two projections.
        h_RF = dispatcher.dispatch(dispatcher.combine(h_RF, plan, None), plan)
        y_ND = dispatcher.combine(dispatcher.linear(h_RF, leaves[3], plan, "auto"), plan, gate_NK)
        return [y_ND.detach(), *torch.autograd.grad(y_ND, leaves, grad_ND)]

    everything = run(LocalDispatcher(), list(range(P)), whole)
    own = slice(sum(tokens[: mesh.rank]), sum(tokens[: mesh.rank + 1]))
    local = LocalDispatcher().expert_range(E // P)
    experts = slice(mesh.rank * len(local), (mesh.rank + 1) * len(local))
    expected = [everything[0][own], everything[1][own], everything[2][own], *(w[experts] for w in everything[3:])]
    found = {}
    for name, dispatcher in {
        "tokens": AllToAllDispatcher(mesh.ep_group),
        "weights": GatheringDispatcher(mesh.ep_group, recomputed=False),
        "weights kept": GatheringDispatcher(mesh.ep_group, recomputed=True),
    }.items():
        got = run(dispatcher, [mesh.rank], [w[experts] for w in whole])
        worst = max((float((a - b).abs().max()) for a, b in zip(got, expected, strict=True) if a.numel()), default=0.0)
        worst = torch.tensor(worst)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found[name] = worst.item()
    return found


def main() -> None:
    torch.set_num_threads(1)
    out, work = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    seen: dict[str, Any] = {"layouts": {}, "collectives": {}, "dispatch": {}}
    with process_group(identify(os.environ)):
        assert B % dist.get_world_size() == 0
        for name, tree in work["layouts"].items():
            seen["layouts"][name] = through_scenarios(out / name, validate(tree), work["starts"])
        for name, tree in work.get("collectives", {}).items():
            seen["collectives"][name] = collectives_of_a_step(validate(tree))
        for name, num_tokens in work.get("dispatch", {}).items():
            seen["dispatch"][name] = errors_of_dispatch(num_tokens)
        if dist.get_rank() == 0:
            (out / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
