"""`slurm/pretrain_8b.sh`, two nodes with two ranks each: undisturbed, stopped and preempted, and with a node that dies.

The script is as it is; sizes come from sbatch's options and MEGAMF_* variables. All runs end with the same losses.
"""

import inspect
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamf.cli import run
from megamf.tools import prepare, tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
STEPS = 16
MODEL = "n_layer=2 n_embd=32 att_hidden=32 ffd_hidden=32 gating_size=16 vocab_size=512 block_size=64 history_length=64"
SETTINGS = [
    *(f"model.{word}" for word in MODEL.split()), f"train.steps={STEPS}", "train.seq_len=64", "train.micro_batch=1",
    "train.global_batch=4", "train.eval_every=0", "optim.warmup_steps=4", "checkpoint.every=4",
    "logging.tensorboard=false",
]  # fmt: skip
# A pause in every step, so that what happens from outside happens in the middle of the run.
PAUSES = json.dumps([{"at": "step", "action": "sleep", "seconds": 1.0, "times": 0, "rank": 0}])


@dataclass
class Launcher:
    """Starts the script for runs that differ in their directory alone."""

    cluster: object
    top: Path
    report: list[str]

    def submit(self, name: str, faults: str = PAUSES) -> str:
        """The script with the sizes of this machine; returns the id of the job."""
        return self.cluster.submit(
            "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--job-name={name}",
            f"--output={self.top}/{name}.log", ROOT / "slurm" / "pretrain_8b.sh",
            MEGAMF_PRESET="nano", MEGAMF_EP="2", MEGAMF_VENV=sys.prefix, MEGAMF_RUN_DIR=f"{self.top}/{name}",
            MEGAMF_TOKENIZER=f"{self.top}/t.model", MEGAMF_TRAIN=f"{self.top}/text", MEGAMF_FAULTS=faults,
            MEGAMF_OVERRIDES=" ".join(SETTINGS), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
        )  # fmt: skip

    def steps(self, name: str) -> dict[int, float]:
        """Losses by step, as far as they are written."""
        path = self.top / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}

    def reach(self, name: str, job: str, step: int) -> None:
        """Wait until `step` is done."""
        self.await_while_alive(name, job, f"step {step}", lambda: max(self.steps(name), default=0) >= step)

    def put_back(self, name: str, job: str, times: int) -> None:
        """Wait until the job has been put back into the queue so many times."""
        self.await_while_alive(name, job, f"requeue {times}", lambda: int(self.cluster.job(job)["Restarts"]) >= times)

    def await_while_alive(self, name: str, job: str, what: str, condition: Callable[[], bool]) -> None:
        """Wait; what squeue says then goes to the report. A requeued job is hurried on."""

        def met() -> bool:
            ended = self.cluster.ended(job)
            assert ended is None, f"{name} ended as {ended['JobState']} before {what}\n{self.log(name)}"
            return condition()

        self.cluster.wait_for(f"{what} of {name}", met)
        self.report += [f"{name}, {what}:", *self.cluster.run("squeue").splitlines()]

    def finish(self, name: str, job: str) -> dict[str, str]:
        """The job at its end; what sacct knows of it goes to the report."""
        facts = self.cluster.finish(job)
        final = self.steps(name).get(STEPS)
        self.report += [f"{name}: loss of step {STEPS} {final}", *self.cluster.sacct(job).splitlines()]
        assert facts["JobState"] == "COMPLETED", self.log(name)
        return facts

    def log(self, name: str) -> str:
        return (self.top / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def launcher(cluster, report, tmp_path_factory) -> Launcher:
    top = tmp_path_factory.mktemp("training")
    texts = [inspect.getsource(getattr(textwrap, name)) for name in textwrap.__all__]
    (top / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = ["--input", str(top / "text.jsonl")]
    assert run(tokenizer.main, [*inputs, "--vocab-size", "512", "--output", str(top / "t.model")]) == 0
    assert run(prepare.main, [*inputs, "--tokenizer", str(top / "t.model"), "--output", str(top / "text")]) == 0
    return Launcher(cluster, top, report)


@pytest.fixture(scope="module")
def undisturbed(launcher) -> dict[int, float]:
    job = launcher.submit("undisturbed", faults="")
    assert launcher.finish("undisturbed", job)["Restarts"] == "0"
    losses = launcher.steps("undisturbed")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1]
    return losses


def test_an_undisturbed_run(undisturbed, launcher):
    log = launcher.log("undisturbed")
    assert "nano on 4 ranks, 2 nodes (n[1-2]), rendezvous 127.0.0.1:" in log
    assert not (launcher.top / "undisturbed" / "slurm-starts").exists()


def test_a_run_that_is_told_to_stop_and_then_preempted(undisturbed, launcher):
    """First the signal that comes ahead of the time limit, then a job that takes the nodes away."""
    job = launcher.submit("preempted")
    launcher.reach("preempted", job, 3)
    launcher.cluster.run("scancel", "--signal=USR1", job)
    launcher.put_back("preempted", job, 1)
    launcher.reach("preempted", job, 7)
    urgent = launcher.cluster.submit(
        "--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=srun sleep 1"
    )
    launcher.put_back("preempted", job, 2)
    assert launcher.cluster.finish(urgent)["JobState"] == "COMPLETED"
    assert launcher.finish("preempted", job)["Restarts"] == "2"
    assert launcher.log("preempted").count("stopped early with a complete checkpoint; back into the queue") == 2
    assert launcher.steps("preempted") == undisturbed


def test_a_run_whose_node_dies(undisturbed, launcher):
    """The node falls silent: nothing on it answers, and no connection is closed."""
    cluster = launcher.cluster
    job = launcher.submit("node-death")
    launcher.reach("node-death", job, 6)
    dead = cluster.processes_of("n2")
    assert len(dead) >= 4  # slurmd, a step manager, two ranks
    for pid in dead:
        os.kill(pid, signal.SIGSTOP)
    try:
        launcher.put_back("node-death", job, 1)
        launcher.report += cluster.run("sinfo", "-N", "-l").splitlines()
    finally:
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        cluster.daemons["slurmd-n2"].wait(20)
    cluster.start_node("n2")
    assert launcher.finish("node-death", job)["Restarts"] == "1"
    assert "from step 4" in launcher.log("node-death")
    assert "NODE_FAIL" in cluster.sacct(job)
    assert launcher.steps("node-death") == undisturbed
