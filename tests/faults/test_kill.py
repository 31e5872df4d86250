"""kill -9 of any rank at any moment: every rank ends soon, and the next start goes on as if nothing had happened.

The whole test, 25 kills on 2 to 4 processes, is run by `pytest -m soak -s`; three kills are always run.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamf.checkpoint import Checkpoint, latest, verify
from megamf.checkpoint.layout import step_of
from megamf.checkpoint.verify import read_manifest
from megamf.parallel.launch import free_port

STEPS, EVERY = 36, 3
HANG_TIMEOUT = 60
# All other ranks have ended this long after the killed one. What it takes is the time in which gloo notices the closed
# connection; the watchdog's time where the ranks had not met yet. The rest is for slow machines.
SOON, UNMET = 60.0, 60.0 * 1.2 + 60
SAVE_POINTS = {"save.begin", "save.shard", "save.manifest", "save.rename", "save.latest"}
ON_MAIN = {"save.manifest", "save.rename", "save.latest"}


@pytest.fixture(scope="module")
def long_run(start):
    """long_run(run_dir, world, faults=[], overrides=[]) -> Job of STEPS steps that saves every EVERY of them."""

    def run(run_dir: Path, world: int, faults: list[dict] | None = None, overrides: list[str] | None = None):
        words = [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", f"train.hang_timeout={HANG_TIMEOUT}"]
        return start(run_dir, world, faults, [*words, *(overrides or [])])

    return run


@pytest.fixture(scope="module")
def undisturbed(long_run, tmp_path_factory):
    """undisturbed(world) -> directory of a run that nothing happened to."""
    done: dict[int, Path] = {}

    def run(world: int) -> Path:
        if world not in done:
            done[world] = tmp_path_factory.mktemp("undisturbed") / str(world)
            ended = long_run(done[world], world).wait()
            assert ended.codes == [0] * world, str(ended)
        return done[world]

    return run


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run_dir: Path) -> dict[int, tuple]:
    """What a step shows, to the last bit."""
    found = {}
    for record in records(run_dir):
        if "loss" in record:
            assert record["step"] not in found
            found[record["step"]] = (record["loss"], record["aux_loss"], record["grad_norm"])
    return found


def saved_step(run_dir: Path) -> int:
    """The step that the next start goes on from."""
    path = latest(run_dir / "checkpoints")
    return 0 if path is None else step_of(path.name)


def assert_same(run_dir: Path, reference: Path) -> None:
    """Every loss of every step, and every byte of the last checkpoint's tensors."""
    assert losses(run_dir) == losses(reference)
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))
    mine, other = latest(run_dir / "checkpoints"), latest(reference / "checkpoints")
    assert verify(mine) == []
    mine, other = read_manifest(mine).tensors, read_manifest(other).tensors
    assert {name: entry.crc32 for name, entry in mine.items()} == {name: entry.crc32 for name, entry in other.items()}


def plan_kill(rng: random.Random, world: int, after: int) -> dict:
    """A fault at a random point of one of the next steps; half of them inside a save."""
    rank = rng.randrange(world)
    if rng.random() < 0.5:
        point = rng.choice(sorted(SAVE_POINTS))
        step = after // EVERY * EVERY + EVERY * rng.choice((1, 1, 2))
        rank = 0 if point in ON_MAIN else rank
        passes = 40 if point == "save.shard" else 1
    else:
        point = rng.choice(("data", "forward", "dispatch", "dispatch", "loss", "backward", "gradients", "step"))
        step = after + rng.randint(1, EVERY + 1)
        passes = {"dispatch": 40, "data": 1, "step": 1}.get(point, 12 // world)
    return {"at": point, "action": "kill", "rank": rank, "step": min(step, STEPS), "after": rng.randrange(passes)}


def inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def kill_by_time(rng: random.Random, job, run_dir: Path, before: int | None, step: int, early: bool) -> None:
    """Kill a rank at a random time: of its start, or after `step`. `before`: the metrics file before this start."""
    if early:
        time.sleep(rng.uniform(0.1, 3.0))
    else:
        metrics = run_dir / "metrics.jsonl"
        # The steps that will be made again are dropped from the file at the start, by a new file.
        while all(code is None for code in job.codes) and (
            inode(metrics) in (None, before) or max(losses(run_dir), default=0) < step
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
    rng.choice(job.ranks).kill()


def soak(long_run, reference: Path, run_dir: Path, world: int, kills: int, rng: random.Random) -> tuple[float, int]:
    """Kill and start again, `kills` times, then finish; returns the longest end in seconds and the most steps lost."""
    longest, lost, killed, resumed = 0.0, 0, 0, 0
    while killed < kills:
        timed = killed % 4 == 2
        early = timed and killed % 8 == 6
        fault = None if timed else plan_kill(rng, world, resumed)
        before = inode(run_dir / "metrics.jsonl")
        job = long_run(run_dir, world, [fault] if fault else [])
        what = str(fault or ("by time, early" if early else "by time"))
        if timed:
            kill_by_time(rng, job, run_dir, before, resumed + rng.randint(1, EVERY), early)
        ended = job.wait(end=UNMET if timed else SOON)
        if resumed and not early:
            assert f"resumed at step {resumed} of {STEPS}" in ended.logs[0], str(ended)
        reached = max(losses(run_dir), default=0)
        saved = saved_step(run_dir)
        print(f"{world} ranks, {what}: exit codes {ended.codes}, all ended after {ended.seconds:.1f} s, "
              f"at step {reached}, saved {saved}", flush=True)  # fmt: skip
        assert ended.codes.count(-9) == 1 and 0 not in ended.codes, f"{what}: {ended}"
        # A save is complete once `latest` names it, and it begins when its step has been told.
        assert resumed <= saved <= reached <= saved + EVERY, f"{what}: {ended}"
        for path in (run_dir / "checkpoints").glob("step-*"):
            assert verify(path) == [], path
        longest, lost = max(longest, ended.seconds), max(lost, reached - saved)
        killed, resumed = killed + 1, saved
        if resumed == STEPS:
            break
    ended = long_run(run_dir, world).wait()
    assert ended.codes == [0] * world, str(ended)
    assert_same(run_dir, reference)
    assert killed == kills, f"the run was over after {killed} kills: make it longer"
    return longest, lost


@pytest.mark.slow
def test_three_kills(long_run, undisturbed, tmp_path):
    soak(long_run, undisturbed(2), tmp_path / "run", 2, 3, random.Random(1))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("world", "kills"), [(2, 9), (3, 8), (4, 8)])
def test_twenty_five_kills(long_run, undisturbed, tmp_path, world, kills):
    longest, lost = soak(long_run, undisturbed(world), tmp_path / "run", world, kills, random.Random(world))
    what = f"{kills} kills of {world} ranks, every loss and the last checkpoint as without them"
    print(f"{what}: all ended {longest:.1f} s after the killed one, at most {lost} steps were made again", flush=True)


@pytest.mark.slow
def test_a_kill_inside_a_background_save(long_run, undisturbed, tmp_path):
    """The other rank's writer waits for files that never come, and must not keep its process."""
    kill = {"at": "save.shard", "action": "kill", "rank": 1, "after": 100}
    ended = long_run(tmp_path / "run", 2, [kill], ["checkpoint.background=true"]).wait(end=SOON)
    assert ended.codes == [1, -9], str(ended)
    assert saved_step(tmp_path / "run") < STEPS
    ended = long_run(tmp_path / "run", 2, [], ["checkpoint.background=true"]).wait()
    assert ended.codes == [0, 0], str(ended)
    assert_same(tmp_path / "run", undisturbed(2))


@pytest.mark.slow
def test_torchrun_ends_with_an_error_and_goes_on_when_started_again(settings, undisturbed, tmp_path):
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    kill = [{"at": "save.rename", "action": "kill", "rank": 0, "step": 2 * EVERY}]
    codes = []
    for faults in (kill, []):
        words = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        words += [f"--master-port={free_port()}", "-m", "megamf.train", str(tmp_path / "config.yaml")]
        words += [f"run.dir={tmp_path / 'run'}", "parallel.ep=2", f"train.steps={STEPS}", f"checkpoint.every={EVERY}"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        extra = {"MEGAMF_FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
        done = subprocess.run(words, env=os.environ | extra, capture_output=True, text=True, timeout=300, check=False)
        codes.append(done.returncode)
        if faults:
            assert saved_step(tmp_path / "run") == EVERY
    assert codes[0] != 0 and codes[1] == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", undisturbed(2))
    with Checkpoint(tmp_path / "run" / "checkpoints") as checkpoint:
        assert checkpoint.state["step"] == STEPS
