"""Faults happen where they were asked for, as often as asked for, and nowhere without the variable."""

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import megamf
from megamf import faults
from megamf.errors import UserError


@pytest.fixture
def ask(monkeypatch):
    """ask({...}, ...): this process has been started with these faults."""

    def install(*wanted: dict) -> None:
        monkeypatch.setattr(faults, "_faults", faults.parse({"MEGAMF_FAULTS": json.dumps(wanted)}))
        monkeypatch.setattr(faults, "_step", None)

    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setenv("RANK", "1")
    return install


def test_inert_without_the_variable(monkeypatch):
    monkeypatch.setattr(faults, "_faults", faults.parse({}))
    value = torch.ones(3)
    for point in faults.POINTS:
        faults.reach(point, step=3)
        assert faults.spoil(point, value) is value


def test_every_point_is_reached_somewhere():
    """A point that nothing reaches would make a test of it pass without a fault."""
    package = Path(megamf.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "faults.py")
    missing = [
        point for point in faults.POINTS if f'reach("{point}"' not in source and f'spoil("{point}"' not in source
    ]
    assert missing == []


def test_rank_step_after_and_times_choose_the_pass(ask):
    ask({"at": "forward", "action": "raise", "rank": 1, "step": 2, "after": 1, "times": 2})
    happened = []
    for step in (1, 2, 3):
        faults.reach("data", step=step)
        for number in range(5):
            try:
                faults.reach("forward")
            except faults.InjectedFault:
                happened.append((step, number))
    assert happened == [(2, 1), (2, 2)]


def test_other_ranks_are_spared(ask):
    ask({"at": "forward", "action": "raise", "rank": 0})
    faults.reach("forward")


@pytest.mark.parametrize(("action", "number"), [("full_disk", errno.ENOSPC), ("read_only", errno.EROFS)])
def test_errors_of_the_system(ask, action, number):
    ask({"at": "save.shard", "action": action})
    with pytest.raises(OSError) as caught:
        faults.reach("save.shard")
    assert caught.value.errno == number


def test_sleep_sleeps_always_where_times_is_zero(ask):
    ask({"at": "step", "action": "sleep", "seconds": 0.02, "times": 0})
    began = time.monotonic()
    for _ in range(3):
        faults.reach("step")
    assert time.monotonic() - began >= 0.06


def test_loss_is_spoiled_in_value_and_gradient(ask):
    ask({"at": "loss", "action": "scale", "factor": 100.0}, {"at": "loss", "action": "nan", "after": 1})
    weight = torch.ones((), requires_grad=True)
    values = [faults.spoil("loss", 2 * weight) for _ in range(3)]
    assert values[0].item() == 200.0 and values[1].isnan() and values[2].item() == 2.0
    values[0].backward()
    assert weight.grad.item() == 200.0


def test_one_gradient_gets_one_nan_behind_a_finite_loss(ask):
    ask({"at": "backward", "action": "nan"})
    model = torch.nn.Linear(3, 2)
    counts = []
    for _ in range(2):
        loss = model(torch.ones(1, 3)).sum()
        faults.reach("backward", model=model)
        model.zero_grad()
        loss.backward()
        assert loss.isfinite()
        counts.append(sum(int(parameter.grad.isnan().sum()) for parameter in model.parameters()))
    assert counts == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "no JSON"),
        ('{"at": "data"}', "list of objects"),
        ('[{"at": "lunch", "action": "kill"}]', "at='lunch' is none of start, load, data"),
        ('[{"at": "data", "action": "dance"}]', "action='dance' is none of kill"),
        ('[{"at": "data", "action": "kill", "stepp": 1}]', "unknown key 'stepp'"),
        ('[{"at": "data", "action": "nan"}]', "nan happens at loss or backward, not data"),
    ],
)
def test_mistakes_are_refused(text, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        faults.parse({"MEGAMF_FAULTS": text})


def test_kill_ends_the_process_on_the_spot():
    code = "from megamf import faults; faults.reach('data', step=1); print('alive', flush=True)"
    wanted = [{"at": "data", "step": 2, "action": "kill"}]
    done = subprocess.run(
        [sys.executable, "-c", code + "; faults.reach('data', step=2); print('still alive')"],
        env={"MEGAMF_FAULTS": json.dumps(wanted), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-9, "alive\n")
