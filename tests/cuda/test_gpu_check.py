"""tools/gpu_check.sh without a GPU: it says so, leaves its log, and fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would run all of its tests")
def test_without_a_gpu(tmp_path: Path) -> None:
    environment = {"OUT": str(tmp_path / "out"), "MEGAMF_PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    log = (tmp_path / "out" / "gpu_check.log").read_text(encoding="utf-8")
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stdout and log == done.stdout
    assert not (tmp_path / "out" / "gpu.json").exists()
