"""The Slurm scripts with stand-ins for srun and scontrol: what they start, where, and what they do afterwards."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megamf.config import load_config
from megamf.train import parse

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("pretrain_*.sh"))
EVERY = sorted(path.name for path in (ROOT / "slurm").glob("*.sh"))

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/srun"
env > "$RECORD/env"
exit "${SRUN_EXIT:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames "*) printf 'node7\\nnode8\\n' ;;
  "-o show node node7") echo "NodeName=node7 NodeAddr=${ADDRESS:-10.0.0.7} NodeHostName=node7" ;;
  "-o show job 123456") echo "JobId=123456 JobState=${STATE:-RUNNING} Reason=None" ;;
  *) printf '%s\\n' "$@" > "$RECORD/scontrol" ;;
esac
"""


def submit(tmp_path, script, **variables):
    """Run a copy of the script as Slurm would, from its spool, with stand-ins first in PATH."""
    checkout, spool, stand_ins = tmp_path / "checkout", tmp_path / "spool", tmp_path / "bin"
    for folder in (checkout / "slurm", checkout / ".venv" / "bin", spool, stand_ins):
        folder.mkdir(parents=True, exist_ok=True)
    (checkout / ".venv" / "bin" / "activate").write_text("")
    for name in ("common.sh", "environment.sh"):
        (checkout / "slurm" / name).write_text((ROOT / "slurm" / name).read_text())
    job = spool / "slurm_script"
    job.write_text((ROOT / "slurm" / script).read_text())
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    environment = {
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "RECORD": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_SUBMIT_DIR": str(checkout),
        "MEGAMF_TOKENIZER": "/data/t.json",
        "MEGAMF_TRAIN": "/data/a:0.7 /data/b",
    } | variables
    environment = {key: value for key, value in environment.items() if value is not None}
    return subprocess.run(["bash", str(job)], env=environment, capture_output=True, text=True, timeout=60)


def started(tmp_path):
    """The configuration that srun's command line stands for, and the environment it was started in."""
    words = (tmp_path / "srun").read_text().splitlines()
    at = words.index("megamf")
    assert words[at + 1] == "train"
    arguments = parse(words[at + 2 :])
    config = load_config(preset=arguments.preset, overrides=arguments.overrides)
    return config, dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)


@pytest.mark.parametrize("script", EVERY)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / script)], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", *EVERY]
    done = subprocess.run(command, cwd=ROOT / "slurm", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_sizes_come_from_sbatch_lines_before_the_first_command(script):
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]
    assert {"--requeue", "--signal=USR1@120"} <= set(options)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    sizes = dict(option.removeprefix("--").split("=") for option in options if "=" in option)
    assert sizes.get("gpus-per-node", sizes["ntasks-per-node"]) == sizes["ntasks-per-node"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_preset_fits_the_ranks_of_its_script(tmp_path, script):
    assert submit(tmp_path, script).returncode == 0
    config, _ = started(tmp_path)
    sizes = dict(re.findall(r"#SBATCH --(nodes|ntasks-per-node)=(\d+)", (ROOT / "slurm" / script).read_text()))
    ranks = int(sizes["nodes"]) * int(sizes["ntasks-per-node"])
    config.train.accumulation_steps(ranks)
    config.parallel.check(ranks, config.model)


def test_the_8b_script_starts_one_training_process_a_rank(tmp_path):
    result = submit(tmp_path, "pretrain_8b.sh")
    assert result.returncode == 0, result.stderr
    config, environment = started(tmp_path)
    assert config.model.n_layer == 48
    assert [(str(s.path), s.weight) for s in config.data.train] == [("/data/a", 0.7), ("/data/b", 1.0)]
    assert str(config.run.dir) == "runs/molm-700m-8b"
    assert {"--label", "--wait=60", "--kill-on-bad-exit=0"} <= set((tmp_path / "srun").read_text().splitlines())
    assert environment["MASTER_ADDR"] == "10.0.0.7"
    assert 1024 < int(environment["MASTER_PORT"]) < 65536
    assert environment["OMP_NUM_THREADS"] == environment["SRUN_CPUS_PER_TASK"] == "6"
    assert not (tmp_path / "scontrol").exists()


def test_variables_turn_it_into_a_nano_run(tmp_path):
    variables = {
        "MEGAMF_PRESET": "nano", "MEGAMF_EP": "2", "MEGAMF_DEEPSPEED": "zero2", "MEGAMF_RUN_DIR": f"{tmp_path}/x",
        "MEGAMF_VALID": "/data/v", "MEGAMF_OVERRIDES": "train.steps=100 optim.lr=1e-3", "MEGAMF_MASTER_PORT": "4567",
    }  # fmt: skip
    assert submit(tmp_path, "pretrain_8b.sh", **variables).returncode == 0
    config, environment = started(tmp_path)
    assert (config.model.n_embd, config.parallel.ep, config.deepspeed) == (192, 2, "zero2")
    assert (config.train.steps, config.optim.lr, str(config.run.dir)) == (100, 1e-3, f"{tmp_path}/x")
    assert str(config.data.valid[0].path) == "/data/v"
    assert environment["MASTER_PORT"] == "4567"


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, True), (137, True), (2, False), (0, False)])
def test_what_may_succeed_next_time_goes_back_into_the_queue(tmp_path, code, requeued):
    assert submit(tmp_path, "pretrain_nano_cpu.sh", SRUN_EXIT=str(code)).returncode == code
    asked = tmp_path / "scontrol"
    assert asked.exists() is requeued
    if requeued:
        assert asked.read_text().split() == ["requeue", "123456"]


@pytest.mark.parametrize(("state", "reason"), [("COMPLETING", "cancelled"), ("PENDING", "on its way back already")])
def test_a_job_that_slurm_ends_is_left_alone(tmp_path, state, reason):
    result = submit(tmp_path, "pretrain_nano_cpu.sh", SRUN_EXIT="75", STATE=state)
    assert result.returncode == 75, reason
    assert f"JobState={state}" in result.stdout
    assert not (tmp_path / "scontrol").exists()


def starts(tmp_path, **variables):
    """One start: exit code, and whether the job was put back."""
    (tmp_path / "scontrol").unlink(missing_ok=True)
    result = submit(tmp_path, "pretrain_nano_cpu.sh", MEGAMF_RUN_DIR=f"{tmp_path}/run", **variables)
    return result.returncode, (tmp_path / "scontrol").exists()


def reach_step(tmp_path, step):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def test_starts_without_a_new_checkpoint_are_counted(tmp_path):
    reach_step(tmp_path, 8)
    assert [starts(tmp_path, SRUN_EXIT="1") for _ in range(2)] == [(1, True)] * 2
    for told_to_stop in (75, 143, 138):  # is no failure, and forgives none
        assert starts(tmp_path, SRUN_EXIT=str(told_to_stop)) == (told_to_stop, True)
    reach_step(tmp_path, 7)  # going back is no progress
    assert starts(tmp_path, SRUN_EXIT="1") == (1, False)
    (tmp_path / "srun").unlink()
    assert starts(tmp_path) == (1, False)  # a start that Slurm brought about
    assert not (tmp_path / "srun").exists()


def test_a_new_checkpoint_and_another_job_start_counting_again(tmp_path):
    again = {"SRUN_EXIT": "1", "MEGAMF_MAX_FAILURES": "2"}
    reach_step(tmp_path, 1)
    assert starts(tmp_path, **again) == (1, True)
    reach_step(tmp_path, 10)
    assert starts(tmp_path, **again) == (1, True)
    assert starts(tmp_path, **again) == (1, False)
    (tmp_path / "run" / "slurm-starts").write_text("99 10 2\n")
    assert starts(tmp_path, **again) == (1, True)
    assert starts(tmp_path, SRUN_EXIT="0") == (0, False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]


@pytest.mark.parametrize("name", ["MEGAMF_MAX_FAILURES", "MEGAMF_GRACE"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_are_whole_numbers(tmp_path, name, value):
    result = submit(tmp_path, "pretrain_8b.sh", **{name: value})
    assert result.returncode == 2
    assert f"{name}={value}" in result.stderr
    assert not (tmp_path / "srun").exists()


@pytest.mark.parametrize("name", ["MEGAMF_TOKENIZER", "MEGAMF_TRAIN", "SLURM_JOB_ID", "SLURM_SUBMIT_DIR"])
def test_what_is_missing_is_named_before_anything_starts(tmp_path, name):
    result = submit(tmp_path, "pretrain_8b.sh", **{name: None})
    assert result.returncode != 0
    assert name in result.stderr or "sbatch" in result.stderr
    assert not (tmp_path / "srun").exists()
