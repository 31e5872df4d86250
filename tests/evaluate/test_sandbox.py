"""What a generated program can and cannot do."""

import os
import time

import pytest

from megamf.errors import UserError
from megamf.evaluate import sandbox
from megamf.evaluate.sandbox import Limits, check_sandbox, execute


@pytest.fixture(scope="module", autouse=True)
def available():
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def test_a_program_that_runs_to_its_end_passes():
    assert execute("import collections, re\nassert re.match('a', 'abc')").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'unequal'", "AssertionError: unequal"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "exit code 0"),
        ("import os; os._exit(0)", "exit code 0"),
        (
            "import os\nfor i in range(3, 32):\n    try: os.write(i, b'guess')\n    except OSError: pass\nos._exit(0)",
            "code 0",
        ),
        ("import os; os.fork()", "BlockingIOError"),
        ("import subprocess; subprocess.run(['true'])", "BlockingIOError"),
        ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
        ("import socket; socket.create_connection(('192.0.2.1', 80), 3)", "Network is unreachable"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('f', 'wb').write(bytes(2 << 20))", "File too large"),
        ("import os; os.kill(os.getppid(), 0)", "PermissionError"),
        ("import megamf", "ModuleNotFoundError"),
    ],
)
def test_what_fails(program, reason):
    if "getppid" in program and os.getuid() != 0:
        pytest.skip("only root gives the program another user")
    outcome = execute(program)
    assert not outcome.passed and reason in outcome.reason


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(program):
    began = time.monotonic()
    assert execute(program, Limits(seconds=1)).reason == "timeout"
    assert time.monotonic() - began < 30


def test_files_outside_cannot_be_written(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root gives the program another user")
    target = tmp_path / "x"
    outcome = execute(f"open({str(target)!r}, 'w')")
    assert "PermissionError" in outcome.reason and not target.exists()


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    execute("open('mine', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []
