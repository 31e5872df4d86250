"""The same configuration under torchrun and the deepspeed launcher; two processes with EP 2 x ZeRO-1 each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamf.parallel.launch import free_port

SETTINGS = [
    "model.vocab_size=61", "model.n_layer=1", "model.n_embd=16", "model.att_hidden=16", "model.ffd_hidden=16",
    "model.n_att_experts=2", "model.n_mlp_experts=4", "model.gating_size=8", "train.steps=2", "train.seq_len=24",
    "train.micro_batch=2", "train.global_batch=4", "optim.warmup_steps=1", "checkpoint.every=0",
    "logging.tensorboard=false", "parallel.ep=2",
]  # fmt: skip


def command(launcher: str) -> list[str]:
    scripts, port = Path(sys.executable).parent, str(free_port())
    if launcher == "torchrun":
        options = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
        return [str(scripts / "torchrun"), *options, "-m", "megamf.train"]
    return [str(scripts / "deepspeed"), "--num_gpus", "2", "--master_port", port, "--module", "megamf.train"]


def losses(launcher: str, arguments: list[str], directory: Path) -> list[float]:
    # The launchers start `python3` and `python` by name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    words = [*command(launcher), *arguments, f"run.dir={directory}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_torchrun_and_deepspeed_train_the_same(corpus, tmp_path):
    arguments = [*SETTINGS, f"data.train=[{{path: {corpus}}}]"]
    found = {launcher: losses(launcher, arguments, tmp_path / launcher) for launcher in ("torchrun", "deepspeed")}
    assert len(found["torchrun"]) == 2
    assert found["torchrun"] == found["deepspeed"]


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_every_rank(corpus, tmp_path):
    words = [
        *command("torchrun"),
        *SETTINGS,
        f"data.train=[{{path: {corpus}}}]",
        "parallel.ep=3",
        f"run.dir={tmp_path / 'r'}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "world size 2 is not divisible by parallel.ep=3" in done.stderr
    assert not (tmp_path / "r").exists()
