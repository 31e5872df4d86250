"""The `comm` suite: a training job on 1, 2 and 4 processes of this machine's CPU, with and without expert parallelism.

The global batch is the same everywhere, so that all processes together do one process's work, and `efficiency` is the
throughput of all together over that of one process with all cores. More processes than cores share them: then an
efficiency of 1 is all there is to gain, and what is missing of it was spent on communication, on waiting for each other
and on copies of work that every process does (the optimizer's dense part, router losses).

Shares are of a step's time, seen from the host: inside a collective, or waiting for one that was begun before; waiting
for slower processes is part of it. What runs beside other work is not counted, since nobody waits for it.

All groups of processes stand by, and one at a time makes a step, so that a slow moment of the machine meets all.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from megamf.bench.suite import Figure, Result, machine
from megamf.config import RunConfig, validate
from megamf.parallel.launch import free_port
from megamf.parallel.traffic import attention_expert_bytes

WORLDS = (1, 2, 4)
MODEL = {
    "vocab_size": 2048, "n_layer": 4, "n_embd": 256, "n_head": 1, "att_hidden": 256, "ffd_hidden": 512,
    "n_att_experts": 4, "n_mlp_experts": 8, "k_att": 2, "k_mlp": 2, "gating_size": 64,
}  # fmt: skip
GLOBAL_BATCH, SEQ_LEN = 4, 512
ANSWER = "megamf-comm "
WARMUP = 2

KINDS = {"all_to_all": "all-to-all", "reduce": "all-reduce and reduce-scatter", "gather": "all-gather and broadcast"}


def run(
    progress: Callable[[str], Callable[[], None]],
    *,
    repeats: int = 15,
    worlds: tuple[int, ...] = WORLDS,
    model: dict[str, Any] | None = None,
    seq_len: int = SEQ_LEN,
) -> Result:
    """Measure everything; `worlds` begins with 1. `progress` as in the `cpu` suite."""
    where = machine()
    configs = {
        world: {name: job(world, **changes, model=model, seq_len=seq_len) for name, changes in cases(world).items()}
        for world in worlds
    }
    measured = measure(configs, repeats, progress("turns"))
    figures: list[Figure] = []
    for world in worlds:
        for name, config in configs[world].items():
            alone = figures[0].value if figures else None
            figures += case_figures(world, name, config, measured[world][name], alone)
    return Result("comm", figures, where)


def cases(world: int) -> dict[str, dict[str, Any]]:
    """What is compared on `world` processes: every process with all experts, and experts split over all of them."""
    found: dict[str, dict[str, Any]] = {"no_ep": {"parallel": {"ep": 1}}}
    if world > 1:
        for name, strategy in (("ep_tokens", "move_tokens"), ("ep_weights", "gather_weights")):
            found[name] = {"parallel": {"ep": world, "attention_experts": strategy}}
    return found


def job(world: int, *, parallel: dict[str, Any], model: dict[str, Any] | None, seq_len: int) -> RunConfig:
    """The run configuration of a case."""
    train = {"seq_len": seq_len, "micro_batch": GLOBAL_BATCH // world, "global_batch": GLOBAL_BATCH}
    return validate({"model": model or MODEL, "train": train, "parallel": parallel, "deepspeed": "zero1"})


def measure(
    configs: dict[int, dict[str, RunConfig]], repeats: int, tick: Callable[[], None]
) -> dict[int, dict[str, dict[str, float]]]:
    """Processes -> case -> median seconds of a step and shares of it by kind of collective."""
    steps = {world: {name: [] for name in cases} for world, cases in configs.items()}
    with ExitStack() as stack:
        ask = {world: stack.enter_context(group(world, cases)) for world, cases in configs.items()}
        for turn in range(WARMUP + repeats):
            for world, cases in configs.items():
                for name in cases:
                    seen = ask[world](name)
                    if turn >= WARMUP:
                        steps[world][name].append(seen)
            tick()
    return {world: {name: medians(seen) for name, seen in cases.items()} for world, cases in steps.items()}


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of every key."""
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]}


@contextmanager
def group(world: int, configs: dict[str, RunConfig]) -> Iterator[Callable[[str], dict[str, float]]]:
    """`world` processes that make one step of the case they are asked for; the cores are shared out among them."""
    threads = max(1, (os.cpu_count() or 1) // world)
    with tempfile.TemporaryDirectory() as folder:
        work = {"threads": threads, "cases": {name: config.model_dump(mode="json") for name, config in configs.items()}}
        (Path(folder) / "work.json").write_text(json.dumps(work), encoding="utf-8")
        environment = os.environ | {
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        with answering(
            [sys.executable, "-m", "megamf.bench.comm_rank", folder], world, environment, Path(folder)
        ) as ask:
            yield ask


@contextmanager
def answering(
    command: list[str], world: int, environment: dict[str, str], folder: Path
) -> Iterator[Callable[[str], dict[str, float]]]:
    """ask(line) gives the line to all ranks and returns what rank 0 answers, a line of JSON after `ANSWER`.

    Raises RuntimeError with the ends of the logs where rank 0 ends instead. Leaves no process behind.
    """
    ranks: list[subprocess.Popen] = []
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    try:
        for rank in range(world):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with logs[rank].open("w", encoding="utf-8") as log:
                output = subprocess.PIPE if rank == 0 else log
                ranks.append(
                    subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=output, stderr=log, text=True)
                )

        def ask(line: str) -> dict[str, float]:
            # Which rank cannot hear, and why, the logs tell.
            with suppress(BrokenPipeError):
                for process in ranks:
                    print(line, file=process.stdin, flush=True)
            for answer in ranks[0].stdout:
                if answer.startswith(ANSWER):
                    return json.loads(answer.removeprefix(ANSWER))
            for process in ranks:
                # The others fail on rank 0's end, if not before it; what they say belongs to the error.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
            ends = "\n".join(f"rank {rank}: {log.read_text()[-2000:]}" for rank, log in enumerate(logs))
            raise RuntimeError(f"the group of {world} processes ended early\n{ends}")

        yield ask
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def case_figures(world: int, name: str, config: RunConfig, seen: dict[str, float], alone: float | None) -> list[Figure]:
    """The figures of one case; `alone`: tokens a second of one process."""
    tokens = config.train.global_batch * config.train.seq_len / seen["seconds"]
    if alone is None:
        size = f"width {config.model.n_embd}, {config.model.n_layer} layers, T {config.train.seq_len}, batch 4, float32"
        return [Figure("p1_tokens_per_second", tokens, f"one process with all cores; ModuleFormer of {size}, ZeRO 1")]
    prefix = f"p{world}_{name}"
    what = {
        "no_ep": f"{world} processes, all experts in each",
        "ep_tokens": f"{world} processes, experts split over them, tokens moved",
        "ep_weights": f"{world} processes, experts split over them, attention experts' weights gathered",
    }[name]
    figures = [
        Figure(f"{prefix}_tokens_per_second", tokens, f"{what}: all together"),
        Figure(f"{prefix}_efficiency", tokens / alone, f"{what}: tokens a second over those of one process"),
        Figure(f"{prefix}_comm_share", sum(seen[kind] for kind in KINDS), f"{what}: share of a step in communication"),
    ]
    figures += [
        Figure(f"{prefix}_{kind}_share", seen[kind], f"of it {KINDS[kind]}") for kind in KINDS if seen[kind] > 0
    ]
    if name != "no_ep":
        traffic = attention_expert_bytes(config, world)
        sent = traffic.tokens if name == "ep_tokens" else traffic.weights
        figures.append(Figure(f"{prefix}_attention_mb", sent / 1e6, "MB a rank sends a step for attention experts"))
    return figures
