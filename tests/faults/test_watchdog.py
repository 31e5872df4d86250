"""Who is silent, who is behind, and who is signalled: without a job."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megamf import heartbeat
from megamf.heartbeat import Heartbeat
from megamf.watchdog import Observer, Watchdog, describe


@pytest.fixture
def sleeper():
    """A process that would die of SIGUSR2, and its heartbeat, as if it were rank 1."""
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(100)"], stdout=-1)
    process.stdout.readline()
    own = Heartbeat.of_this_process(1)
    yield process, replace(own, pid=process.pid, started=heartbeat.start_time(process.pid))
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_heartbeat_is_read_as_it_was_written(tmp_path):
    heartbeat.beat("forward", 7)
    own = Heartbeat.of_this_process(3)
    heartbeat.write(tmp_path, own)
    assert heartbeat.read(tmp_path, 3) == own
    assert (own.step, own.phase, own.pid) == (7, "forward", os.getpid())
    assert heartbeat.is_here(own)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rank": 3}', "\x00"])
def test_what_is_no_heartbeat_is_none(tmp_path, content):
    heartbeat.file_of(tmp_path, 3).write_text(content)
    assert heartbeat.read(tmp_path, 3) is None
    assert heartbeat.read(tmp_path, 4) is None


def test_the_process_that_wrote_the_heartbeat_is_signalled(sleeper):
    process, beat = sleeper
    assert heartbeat.send(beat, signal.SIGSTOP)
    while heartbeat.process_state(process.pid) != "T":
        time.sleep(0.01)
    assert heartbeat.send(beat, signal.SIGUSR2, signal.SIGCONT)
    assert process.wait(timeout=60) == -signal.SIGUSR2
    assert not heartbeat.send(beat, signal.SIGUSR2)


def test_no_stranger_is_signalled(sleeper):
    process, beat = sleeper
    strangers = [
        replace(beat, started=beat.started + 1),  # the process id was given to another since
        replace(beat, started=None),
        replace(beat, machine="another machine"),
    ]
    assert [heartbeat.send(stranger, signal.SIGUSR2) for stranger in strangers] == [False] * 3
    time.sleep(0.1)
    assert process.poll() is None


def test_silence_is_measured_by_counts_and_not_by_foreign_clocks():
    observer, base = Observer(), replace(Heartbeat.of_this_process(1), beat_at=1000.0)
    late, early = 5000.0, 100.0  # this machine's Unix time, far ahead of and far behind the other's
    assert observer.look({1: base}, 10.0, late, 1.0)[1] == 0.0
    assert observer.look({1: replace(base, count=base.count + 1)}, 14.0, late, 1.0)[1] == 0.0
    still = replace(base, count=base.count + 1)
    assert observer.look({1: still}, 16.0, late, 1.0)[1] == 2.0
    assert observer.look({1: still}, 17.0, late, 1.0)[1] == 4000.0
    assert observer.look({1: still}, 40.0, early, 1.0)[1] == 26.0
    assert observer.look({1: None}, 41.0, late, 1.0)[1] == float("inf")


def test_a_rank_waits_as_long_as_another_goes_on(tmp_path):
    heartbeat.beat("forward", 1)
    watchdog = Watchdog(tmp_path, 0, 3, 10.0)
    now = heartbeat.pulse.at + 100
    watchdog.looked_at = now
    for silence, hangs in (({1: 50.0, 2: 3.0}, False), ({1: 50.0}, False), ({1: 50.0, 2: float("inf")}, True)):
        watchdog.silence = silence
        assert watchdog.hangs(now) == hangs
    assert not watchdog.hangs(heartbeat.pulse.at + 9)
    heartbeat.beat("start", 0)
    assert not watchdog.hangs(heartbeat.pulse.at + 59)


def test_without_a_file_system_twice_the_time_decides(tmp_path):
    heartbeat.beat("forward", 1)
    watchdog = Watchdog(tmp_path, 0, 2, 10.0)
    watchdog.looked_at = heartbeat.pulse.at
    assert not watchdog.hangs(heartbeat.pulse.at + 15)
    assert watchdog.hangs(heartbeat.pulse.at + 21)


def test_the_report_names_the_furthest_behind_first(sleeper):
    process, beat = sleeper
    own = replace(Heartbeat.of_this_process(0), step=9, phase="forward")
    others = {
        1: replace(beat, step=8, phase="step"),
        2: replace(own, rank=2, machine="far", host="node7", step=7, phase="data"),
        3: None,
    }
    lines = describe(own, others, 600).splitlines()
    assert "no rank has gone on for 600 s" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["  rank 3", "  rank 2", "  rank 1", "  rank 0"]
    assert "node7" in lines[2] and lines[2].endswith("another machine")
    assert f"pid {process.pid}, step 8, step" in lines[3] and lines[3].endswith("alive, waiting")


def test_nothing_is_left_behind_and_zero_turns_it_off(tmp_path):
    with Watchdog(tmp_path / "on", 0, 1, 600.0):
        deadline = time.monotonic() + 60
        while heartbeat.read(tmp_path / "on" / "heartbeats", 0) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat.read(tmp_path / "on" / "heartbeats", 0).pid == os.getpid()
        os.kill(os.getpid(), signal.SIGUSR2)
        (stacks,) = (tmp_path / "on" / "stacks").iterdir()
        assert "test_nothing_is_left_behind" in stacks.read_text()
        stacks.write_text("")
    assert list((tmp_path / "on").iterdir()) == []
    with Watchdog(tmp_path / "off", 0, 1, 0.0):
        assert not (tmp_path / "off").exists()


def test_a_lone_process_that_hangs_ends_with_its_stacks(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from megamf.heartbeat import beat\n"
        "from megamf.watchdog import Watchdog\n"
        "def stuck(): time.sleep(100)\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 0, 1, 1.0): beat('step', 1); stuck()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    assert "no rank has gone on for 1 s" in done.stderr and "in stuck" in done.stderr
    (stacks,) = (tmp_path / "stacks").iterdir()
    assert "in stuck" in stacks.read_text()


def test_a_process_that_was_suspended_goes_on(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from megamf.heartbeat import beat\n"
        "from megamf.watchdog import Watchdog\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 0, 1, 4.0):\n"
        "    beat('step', 1)\n"
        "    print(flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(6.0)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        _, err = process.communicate(b"\n", timeout=60)
        assert process.returncode == 0, err.decode()
    finally:
        process.kill()
        process.wait()
