"""Where there can be no cluster, the reason is told, and nothing is left behind."""

import os

import pytest
import slurm_cluster

APT_GET = """#!/bin/sh
echo "$@" >> "$0.calls"
[ "$2" = "$FAILING" ] && echo "E: no network" >&2 && exit 100
exit 0
"""


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without Slurm where this user may install packages, and an apt-get that brings none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(APT_GET)
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_cluster, "PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(slurm_cluster, "POLICY", tmp_path / "policy-rc.d")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def test_only_root_may(bare, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "do not run as root" in slurm_cluster.unavailable()
    assert not (bare / "bin" / "apt-get.calls").exists()


def test_no_apt_get(bare, monkeypatch):
    monkeypatch.setenv("PATH", str(bare))
    assert "munged, slurmctld" in slurm_cluster.unavailable()
    assert "no apt-get" in slurm_cluster.unavailable()


@pytest.mark.parametrize("step", ["update", "install"])
def test_a_failing_apt_get(bare, monkeypatch, step):
    monkeypatch.setenv("FAILING", step)
    assert slurm_cluster.unavailable() == f"apt-get {step} failed: E: no network"
    assert not slurm_cluster.POLICY.exists()


def test_packages_without_the_programs(bare):
    assert "bring no munged" in slurm_cluster.unavailable()
    calls = (bare / "bin" / "apt-get.calls").read_text().splitlines()
    assert calls[1].endswith(" ".join(slurm_cluster.PACKAGES))
    assert not slurm_cluster.POLICY.exists()


def test_a_policy_of_the_machine_stays(bare):
    slurm_cluster.POLICY.write_text("mine")
    assert slurm_cluster.unavailable()
    assert slurm_cluster.POLICY.read_text() == "mine"
