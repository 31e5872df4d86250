"""A job that hangs ends with exit code 1 on every rank, with the stacks of all of them in the log."""

import socket

import pytest

TIMEOUT = 12


@pytest.fixture(scope="module")
def never_met(start, tmp_path_factory):
    """A job whose second rank dies before the ranks meet. It takes a minute to end, in which the other tests run."""
    kill = {"at": "start", "action": "kill", "rank": 1}
    return start(tmp_path_factory.mktemp("never-met"), 2, [kill], [f"train.hang_timeout={TIMEOUT}"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 2])
def test_a_stopped_rank_is_named_and_the_job_ends(start, never_met, tmp_path, world):
    stop = {"at": "dispatch", "action": "stop", "rank": 1, "step": 3, "after": 5}
    job = start(tmp_path / "run", world, [stop], [f"train.hang_timeout={TIMEOUT}"])
    ended = job.wait()
    assert ended.codes == [1] * world, str(ended)
    log = "".join(ended.logs)
    for rank in range(world):
        assert f"stacks of rank {rank}, pid {job.ranks[rank].pid}" in log, str(ended)
    first = ended.logs[0]
    assert f"no rank has gone on for {TIMEOUT} s" in first
    behind = next(line for line in first.splitlines() if line.startswith("  rank "))
    # What it wrote last may be an interval old.
    assert f"rank 1: host {socket.gethostname()}, pid {job.ranks[1].pid}, step " in behind, str(ended)
    assert behind.endswith("stopped"), str(ended)
    # The stopped process shows the very place, its peers the collective that waits for it.
    (path,) = (tmp_path / "run" / "stacks").glob(f"rank-00001-{job.ranks[1].pid}.txt")
    assert "faults.py" in path.read_text() and "exchange.py" in path.read_text()
    assert "exchange.py" in first


@pytest.mark.slow
def test_a_rank_that_sleeps_shows_where(start, tmp_path):
    """Nobody is stopped here: each process ends itself."""
    sleep = {"at": "gradients", "action": "sleep", "rank": 0, "step": 2, "seconds": 600}
    ended = start(tmp_path / "run", 2, [sleep], [f"train.hang_timeout={TIMEOUT}"]).wait()
    assert ended.codes == [1, 1], str(ended)
    assert "in _happen" in ended.logs[0] and "step 2, gradients" in ended.logs[1], str(ended)


@pytest.mark.slow
def test_a_rank_that_never_came_is_missed(never_met):
    ended = never_met.wait()
    assert ended.codes == [1, -9], str(ended)
    assert "rank 1: no heartbeat" in ended.logs[0], str(ended)
