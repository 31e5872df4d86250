"""Jobs of real processes that are made to fail: every rank a plain process, no launcher that ends the others."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from fault_rank import PRELOAD, run_rank

from megamf.parallel.launch import free_port

STEPS = 12
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(PRELOAD)


@dataclass
class Ended:
    """How a job ended: exit codes by rank, seconds from the first end to the last, the log of each rank."""

    codes: list[int]
    seconds: float
    logs: list[str]

    def __str__(self) -> str:
        logs = "".join(f"--- rank {rank}\n{log[-3000:]}\n" for rank, log in enumerate(self.logs))
        return f"exit codes {self.codes}, {self.seconds:.1f} s after the first\n{logs}"


class Job:
    """`world` processes of one training job."""

    def __init__(self, directory: Path, config: Path, world: int, faults: list[dict], overrides: list[str]) -> None:
        directory.mkdir(parents=True)
        self.logs = [directory / f"rank-{rank}.log" for rank in range(world)]
        shared = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        shared |= {
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MEGAMF_FAULTS": json.dumps(faults),
        }  # fmt: skip
        self.ranks = []
        for rank, path in enumerate(self.logs):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(FORKSERVER.Process(target=run_rank, args=(own, [str(config), *overrides], str(path))))
            self.ranks[-1].start()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes, negative for a signal, None for a rank that runs."""
        return [rank.exitcode for rank in self.ranks]

    def wait(self, start: float = 240.0, end: float = 120.0) -> Ended:
        """Wait for the first rank to end, at most `start` seconds, and then for the others, at most `end` seconds."""
        deadline, first = time.monotonic() + start, None
        while None in self.codes:
            now = time.monotonic()
            if first is None and any(code is not None for code in self.codes):
                first, deadline = now, now + end
            if now > deadline:
                break
            time.sleep(0.02)
        codes, seconds = self.codes, time.monotonic() - first if first else 0.0
        logs = [path.read_text(errors="replace") if path.exists() else "" for path in self.logs]
        ended = Ended(codes, seconds, logs)
        assert None not in codes, f"the job hangs: {ended}"
        return ended

    def kill(self) -> None:
        """End what is left of it."""
        for rank in self.ranks:
            rank.kill()
            rank.join()


@pytest.fixture(scope="session")
def settings(corpus) -> dict:
    """A run of STEPS steps with experts, accumulation, dropout, evaluation and a checkpoint every 2 steps."""
    return {
        "model": {
            "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 1, "att_hidden": 16, "ffd_hidden": 20,
            "n_att_experts": 12, "n_mlp_experts": 12, "gating_size": 8, "moe_pdrop": 0.1, "resid_pdrop": 0.1,
            "bos_token_id": None, "eos_token_id": 0,
        },
        "data": {"train": [{"path": str(corpus)}], "valid_fraction": 0.1},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "steps": STEPS, "seq_len": 24, "micro_batch": 1, "global_batch": 12, "eval_every": 3, "eval_batches": 2,
        },
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"tensorboard": False},
    }  # fmt: skip


@pytest.fixture(scope="module")
def start(settings, tmp_path_factory) -> Iterator[Callable[..., Job]]:
    """start(run_dir, world, faults=[], overrides=[]) -> Job; nothing of it is left behind."""
    directory = tmp_path_factory.mktemp("jobs")
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    jobs: list[Job] = []

    def run(run_dir: Path, world: int, faults: list[dict] | None = None, overrides: list[str] | None = None) -> Job:
        words = [f"run.dir={run_dir}", f"parallel.ep={world}", *(overrides or [])]
        jobs.append(Job(directory / str(len(jobs)), config, world, faults or [], words))
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()
