"""One real cluster for all tests of this room, and what its jobs did in the summary of the test run."""

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, unavailable

REPORT = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A running cluster; tests that ask for it are skipped, with the reason, where there can be none."""
    if reason := unavailable():
        pytest.skip(f"no Slurm: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    assert cluster.processes() == []


@pytest.fixture(scope="session")
def report(request) -> list[str]:
    """Lines that the summary of the test run shows."""
    return request.config.stash.setdefault(REPORT, [])


def pytest_terminal_summary(terminalreporter, config) -> None:
    """squeue and sacct lines of the jobs, passed or failed."""
    if lines := config.stash.get(REPORT, []):
        terminalreporter.section("Slurm jobs")
        for line in lines:
            terminalreporter.write_line(line)
