"""The shell scripts parse, and the quickstart refuses what it must not touch before it installs anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["tools/install.sh", "tools/test.sh", "tools/quickstart.sh", ".ci/run"])
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=60)


def test_quickstart_wants_its_three_steps_in_order():
    environment = {**os.environ, "MEGAMF_STEPS": "100", "MEGAMF_STOP_AT": "50", "MEGAMF_COMPARE": "40"}
    script = str(ROOT / "tools" / "quickstart.sh")
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "MEGAMF_STOP_AT=50 < MEGAMF_COMPARE=40 < MEGAMF_STEPS=100" in result.stderr


def test_quickstart_leaves_a_folder_alone_that_it_did_not_write(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    environment = {**os.environ, "MEGAMF_OUT": str(tmp_path)}
    script = str(ROOT / "tools" / "quickstart.sh")
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert str(tmp_path) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
