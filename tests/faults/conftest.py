"""Jobs of real processes that are made to fail: every rank a plain process, no launcher that ends the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megamf.parallel.launch import free_port

STEPS = 12


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
        command = [sys.executable, "-m", "megamf.train", str(config), *overrides]
        self.ranks: list[subprocess.Popen] = []
        for rank, path in enumerate(self.logs):
            with path.open("w") as log:
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))

    def wait(self, start: float = 240.0, end: float = 120.0) -> Ended:
        """Wait for the first rank to end, at most `start` seconds, and then for the others, at most `end` seconds."""
        deadline, first = time.monotonic() + start, None
        while any(rank.poll() is None for rank in self.ranks):
            now = time.monotonic()
            if first is None and any(rank.poll() is not None for rank in self.ranks):
                first, deadline = now, now + end
            if now > deadline:
                break
            time.sleep(0.02)
        codes = [rank.poll() for rank in self.ranks]
        seconds = time.monotonic() - first if first else 0.0
        ended = Ended(codes, seconds, [path.read_text(errors="replace") for path in self.logs])
        assert None not in codes, f"the job hangs: {ended}"
        return ended

    def kill(self) -> None:
        """End what is left of it."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
            rank.wait()

    @property
    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(rank.poll() is None for rank in self.ranks)


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
