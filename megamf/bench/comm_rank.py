"""One rank of the `comm` suite: `python -m megamf.bench.comm_rank FOLDER` with RANK, WORLD_SIZE and the like set.

Reads FOLDER/work.json, then from its standard input the name of a case for every step to make; rank 0 answers with one
line of JSON on its standard output. Shapes: B batch, T time.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamf.bench.comm import ANSWER
from megamf.bench.training import every_key
from megamf.config import validate
from megamf.data.loader import MicroBatch
from megamf.parallel.launch import identify, process_group

KIND_OF = {
    "all_to_all_single": "all_to_all",
    "all_reduce": "reduce",
    "reduce": "reduce",
    "reduce_scatter_tensor": "reduce",
    "all_gather": "gather",
    "all_gather_into_tensor": "gather",
    "broadcast": "gather",
}


class TimedWork:
    """A collective under way, whose `wait` is timed."""

    def __init__(self, work: Any, kind: str, seconds: dict[str, float]) -> None:
        self._work, self._kind, self._seconds = work, kind, seconds

    def wait(self, *args: Any) -> Any:
        began = time.perf_counter()
        done = self._work.wait(*args)
        self._seconds[self._kind] += time.perf_counter() - began
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def timed_collectives() -> Iterator[dict[str, float]]:
    """Host seconds by kind of collective, of everyone who calls torch.distributed; to be entered before DeepSpeed is
    imported, which keeps some of the functions."""
    seconds: dict[str, float] = defaultdict(float)
    real = {name: getattr(dist, name) for name in KIND_OF}

    def timing(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            work = real[name](*args, **kwargs)
            seconds[KIND_OF[name]] += time.perf_counter() - began
            return work if work is None else TimedWork(work, KIND_OF[name], seconds)

        return call

    for name in real:
        setattr(dist, name, timing(name))
    try:
        yield seconds
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def answer(work: dict[str, Any], seconds: dict[str, float]) -> None:
    """Steps of the cases as they are asked for; seconds of each and shares of it by kind, averaged over ranks."""
    from megamf.trainer import Trainer

    trainers, batches = {}, {}
    for name, tree in work["cases"].items():
        config = validate(tree)
        trainers[name] = Trainer(config, None)
        generator = torch.Generator().manual_seed(dist.get_rank())
        token_BT = torch.randint(
            config.model.vocab_size, (config.train.micro_batch, config.train.seq_len + 1), generator=generator
        )
        batches[name] = MicroBatch(token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous(), None)
    for name in map(str.strip, sys.stdin):
        dist.barrier()
        seconds.clear()
        began = time.perf_counter()
        trainers[name].train_step([batches[name]])
        elapsed = time.perf_counter() - began
        seen = averaged({"seconds": elapsed} | {kind: seconds[kind] / elapsed for kind in set(KIND_OF.values())})
        if dist.get_rank() == 0:
            print(ANSWER + json.dumps(seen), flush=True)


def averaged(seen: dict[str, float]) -> dict[str, float]:
    """The mean over ranks."""
    keys = sorted(seen)
    own = torch.tensor([seen[key] for key in keys], dtype=torch.float64)
    dist.all_reduce(own)
    return dict(zip(keys, (own / dist.get_world_size()).tolist(), strict=True))


def main() -> None:
    """Join the group and answer until the input ends."""
    folder = Path(sys.argv[1])
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    with timed_collectives() as seconds, process_group(identify(os.environ)), every_key():
        answer(work, seconds)


if __name__ == "__main__":
    main()
