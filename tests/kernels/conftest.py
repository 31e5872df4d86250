"""How Triton kernels are run without a GPU: by the interpreter, in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def run_interpreted():
    """Runs the tests of worker files (no `test_` in their names: collected only here) under Triton's interpreter."""

    def run(*names, seconds=400):
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        files = [Path(__file__).parent / name for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]

    return run
