"""Real training steps of several layouts in one process group of the CPU: seconds, peak bytes, bytes sent.

`measure` starts the processes and returns what rank 0 saw. Shapes: B batch, T time.
"""

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megamf.config import RunConfig, to_tree, validate
from megamf.data.loader import MicroBatch, part_of
from megamf.parallel.launch import Process, free_port, process_group
from megamf.plan.devices import measure_peak
from megamf.plan.live import LiveBytes

MEGABYTE = 2**20
KINDS = {
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
}


class Sent(LiveBytes):
    """Live bytes, and the bytes that the collectives of a rank send, by kind: what each of them is handed or makes.

    all_reduce twice its tensor, the others what they exchange; times (n - 1) / n of a group of n. Small ones below a
    thousand values are sums of figures and not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if name in KINDS:
            kind = KINDS[name]
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            if kind == "reduce_scatter":
                tensors = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            if tensors and isinstance(tensors[0], (list, tuple)):
                tensors = tensors[0]
            place = [argument.name for argument in func._schema.arguments].index("process_group")
            size = dist.ProcessGroup.unbox(args[place]).size()
            elements = sum(tensor.numel() for tensor in tensors)
            if elements > 1000 and size > 1:
                held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                self.sent[kind] += round((2 if kind == "all_reduce" else 1) * held * (size - 1) / size)
        return super().__torch_dispatch__(func, types, args, kwargs)


def measure(cases: dict[str, RunConfig], world: int, *, repeats: int, seconds_limit: float = 1800.0) -> dict[str, Any]:
    """Train every case on `world` processes of one thread, taking turns.

    Returns `{"cases": {name: {"seconds": median of a step, "peak": bytes, "built": bytes, "sent": {kind: bytes}}},
    "gemm_flops": rate of one process while all compute, "bytes_per_second": of an all-to-all}`.
    Raises RuntimeError where a process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        work = {name: to_tree(config) for name, config in cases.items()}
        context = multiprocessing.start_processes(
            _rank, (world, free_port(), work, repeats, str(out)), nprocs=world, join=False, start_method="spawn"
        )
        end = time.monotonic() + seconds_limit
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    raise RuntimeError(f"{world} processes did not finish in {seconds_limit:.0f} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return json.loads(out.read_text())


def random_batches(config: RunConfig, world: int, step: int, rank: int) -> list[MicroBatch]:
    """The micro batches of one step: random tokens, one document a row; a rank's part where rows are split."""
    context = config.parallel.context
    generator = torch.Generator().manual_seed(1000 * step + rank // context)
    B, T = config.train.micro_batch, config.train.seq_len
    found = []
    for _ in range(config.accumulation_steps(world)):
        token_BT = torch.randint(config.model.vocab_size, (B, T + 1), generator=generator)
        whole = MicroBatch(token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous(), None)
        found.append(part_of(whole, rank % context, context))
    return found


def _rank(rank: int, world: int, port: int, work: dict[str, dict], repeats: int, out: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from megamf.trainer import Trainer

    with process_group(Process(rank, world, rank)):
        found: dict[str, Any] = {"cases": {}}
        dist.barrier()
        found["gemm_flops"] = measure_peak(seconds=1.0)
        found["bytes_per_second"] = _all_to_all_rate(world)
        trainers, seconds = {}, {name: [] for name in work}
        for name, tree in work.items():
            config = validate(tree)
            live = Sent()
            with live:
                trainer = Trainer(config, None)
                built = live.now
                # The second step: everything that is made once is there.
                trainer.train_step(random_batches(config, world, 0, rank))
                live.sent.clear()
                batches = random_batches(config, world, 1, rank)
                live.reset_peak()
                trainer.train_step(batches)
            found["cases"][name] = {"peak": live.peak, "built": built, "sent": dict(live.sent)}
            trainers[name] = trainer
            if not repeats:
                trainers.clear()
        for turn in range(repeats):
            for name, trainer in trainers.items():
                batches = random_batches(trainer.config, world, 2 + turn, rank)
                dist.barrier()
                began = time.perf_counter()
                trainer.train_step(batches)
                dist.barrier()
                seconds[name].append(time.perf_counter() - began)
        for name, values in seconds.items():
            found["cases"][name]["seconds"] = statistics.median(values) if values else None
        if rank == 0:
            Path(out).write_text(json.dumps(found))
        dist.barrier()


def _all_to_all_rate(world: int, rounds: int = 5) -> float:
    """Bytes a second that a rank sends to the others, 2 MiB to each."""
    send = torch.zeros(world, 2 * MEGABYTE // 4)
    receive = torch.empty_like(send)
    times = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(receive, send)
        times.append(time.perf_counter() - began)
    return 2 * MEGABYTE * (world - 1) / statistics.median(times) if world > 1 else 0.0
