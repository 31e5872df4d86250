"""What the pretraining scripts make of every way in which a job ends, on a real Slurm, with a stand-in for megamf."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]

# The stand-in: it notes the start of every rank; PLAY says what happens in the start of that number.
MEGAMF = r"""#!/usr/bin/env bash
[[ $1 == train ]] || exit 99
start=${SLURM_RESTART_COUNT:-0}
echo "$@" >"$RECORD/arguments"
echo "$SLURM_PROCID" >>"$RECORD/start-$start"
save() { mkdir -p "$RECORD/run/checkpoints"; printf 'step-%08d\n' "$1" >"$RECORD/run/checkpoints/latest"; }
stop() { save $((start + 1)); exit 75; }
trap 'echo "$SLURM_PROCID $start" >>"$RECORD/signals"; stop' USR1 TERM
pause() { echo >>"$RECORD/waiting-$start"; for ((i = 0; i < 600; i++)); do sleep 0.1; done; exit 1; }
eval "$PLAY"
"""


@dataclass
class Play:
    """A job to run: what its ranks do, and what happens to it from outside once they wait."""

    name: str
    play: str
    options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


PLAYS = [
    Play("fine", "exit 0"),
    Play("wrong", "exit 2"),
    Play("hopeless", "exit 1"),
    Play("two-tries", "exit 1", variables={"MEGAMF_MAX_FAILURES": "2"}),
    # A failure with a new checkpoint each time, as often as MEGAMF_MAX_FAILURES.
    Play("progress", "((start < 3)) || exit 0; save $((start + 1)); exit 1"),
    Play("again", "((start < 3)) || exit 0; exit 75"),
    # One rank is killed, the other waits for it.
    Play("killed", "((start == 0)) || exit 0; ((SLURM_PROCID)) || kill -9 $$; pause", ["--ntasks-per-node=2"]),
    Play("late", "((start == 0)) || exit 0; ((SLURM_PROCID)) || sleep 1.5; exit 75", ["--ntasks-per-node=2"]),
    Play("limit", "((start == 0)) || exit 0; pause"),
    # The signal ahead of the limit is not heard, so the limit itself comes.
    Play("overrun", "((start == 0)) || exit 0; trap '' USR1; pause"),
    Play("usr1", "((start == 0)) || exit 0; pause"),
    Play("batch-usr1", "((start == 0)) || exit 0; pause"),
    Play("requeued", "((start == 0)) || exit 0; pause"),
    Play("cancelled", "pause"),
]


def waiting(folder: Path, ranks: int = 1) -> bool:
    return (folder / "waiting-0").exists() and (folder / "waiting-0").read_text().count("\n") == ranks


@pytest.fixture(scope="module")
def played(cluster, report, tmp_path_factory) -> dict[str, tuple[dict[str, str], Path]]:
    """All plays at one time. The job as Slurm describes it at its end, and its folder, by name."""
    top = tmp_path_factory.mktemp("plays")
    (top / "bin").mkdir()
    (top / "bin" / "activate").write_text(f"PATH={top}/bin:$PATH\n")
    (top / "bin" / "megamf").write_text(MEGAMF)
    (top / "bin" / "megamf").chmod(0o755)
    jobs = {}
    for play in PLAYS:
        folder = top / play.name
        folder.mkdir()
        jobs[play.name] = cluster.submit(
            "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--partition=shared",
            *play.options, f"--job-name={play.name}", f"--output={folder}/log", ROOT / "slurm" / "pretrain_8b.sh",
            RECORD=str(folder), MEGAMF_VENV=str(top), MEGAMF_TOKENIZER="t", MEGAMF_TRAIN="d", MEGAMF_GRACE="8",
            MEGAMF_RUN_DIR=f"{folder}/run", PLAY=play.play, **play.variables,
        )  # fmt: skip
    actions = {
        # As near to the limit as Slurm's clock of half minutes needs for the signal that is due 120 seconds ahead.
        "limit": lambda job: cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+110"),
        "overrun": lambda job: cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+1"),
        "usr1": lambda job: cluster.run("scancel", "--signal=USR1", job),
        "batch-usr1": lambda job: cluster.run("scancel", "--batch", "--signal=USR1", job),
        "requeued": lambda job: cluster.run("scontrol", "requeue", job),
        "cancelled": lambda job: cluster.run("scancel", job),
    }
    for name, act in actions.items():
        cluster.wait_for(f"{name} to wait", lambda name=name: waiting(top / name))
        act(jobs[name])

    def all_ended() -> dict[str, dict[str, str]] | None:
        found = {name: cluster.ended(job) for name, job in jobs.items()}
        return found if all(found.values()) else None

    found = cluster.wait_for("the end of all plays", all_ended)
    for name, job in jobs.items():
        report += [f"{name}:", *cluster.sacct(job, "--allocations").splitlines()]
    return {name: (facts, top / name) for name, facts in found.items()}


def outcome(played, name: str) -> tuple[str, str, int]:
    """State, exit code and number of starts."""
    facts, folder = played[name]
    starts = len(list(folder.glob("start-*")))
    assert int(facts["Restarts"]) in (starts - 1, starts)
    return facts["JobState"], facts["ExitCode"], starts


def log(played, name: str) -> str:
    return (played[name][1] / "log").read_text()


def test_a_finished_run_ends_the_job_and_leaves_no_trace(played):
    assert outcome(played, "fine") == ("COMPLETED", "0:0", 1)
    assert not (played["fine"][1] / "run").exists()


def test_a_mistake_is_not_tried_again(played):
    assert outcome(played, "wrong") == ("FAILED", "2:0", 1)
    assert not (played["wrong"][1] / "run").exists()


@pytest.mark.parametrize(("name", "starts"), [("hopeless", 3), ("two-tries", 2)])
def test_failures_without_progress_end_the_job(played, name, starts):
    assert outcome(played, name) == ("FAILED", "1:0", starts)
    assert f"{starts} starts in a row brought no checkpoint beyond step 0; giving up" in log(played, name)


def test_failures_with_progress_do_not(played):
    assert outcome(played, "progress") == ("COMPLETED", "0:0", 4)
    assert "start 3 from step 3" in log(played, "progress")


def test_stopping_early_is_no_failure(played):
    assert outcome(played, "again") == ("COMPLETED", "0:0", 4)


def test_a_killed_rank_takes_the_others_with_it(played):
    assert outcome(played, "killed") == ("COMPLETED", "0:0", 2)
    assert "srun ended with exit code 137" in log(played, "killed")


def test_a_rank_may_end_a_little_later_than_the_first(played):
    assert outcome(played, "late") == ("COMPLETED", "0:0", 2)
    assert "srun ended with exit code 75" in log(played, "late")


@pytest.mark.parametrize("name", ["limit", "overrun", "usr1", "batch-usr1", "requeued"])
def test_signals_reach_the_ranks_and_the_job_goes_on(played, name):
    assert outcome(played, name) == ("COMPLETED", "0:0", 2)
    assert (played[name][1] / "signals").read_text().split("\n")[0] == "0 0"
    assert "start 1 from step 1" in log(played, name)


def test_a_cancelled_job_stays_cancelled(played):
    state, _, starts = outcome(played, "cancelled")
    assert (state, starts) == ("CANCELLED", 1)
    assert "so it is not put back" in log(played, "cancelled")
