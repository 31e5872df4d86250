"""The commands of the experiment fit together: configurations are valid, and nothing is read before it is written."""

import re
import shlex

import pytest

from megamf.config import load_config
from megamf.experiments import modules
from megamf.experiments.stages import Study


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Every command in order, by stage, run by nobody."""
    found = {}
    monkeypatch.setattr(Study, "command", lambda self, name, command, threads=0: found.update({name: command}))
    monkeypatch.setattr(Study, "compute", lambda self, name, function, **arguments: None)
    study = Study(tmp_path)
    modules.data(study)
    modules.base(study)
    for part in (modules.specialisation, modules.pruning, modules.insertion):
        part(study, 1)
    return found


def test_every_training_configuration_is_valid(commands):
    checked = 0
    for command in commands.values():
        words = shlex.split(command)
        if "--preset" not in words:
            continue
        preset = words[words.index("--preset") + 1]
        overrides = [word for word in words if "=" in word]
        config = load_config(preset=preset, overrides=overrides)
        assert config.train.steps >= 100
        checked += 1
    assert checked > 20


def test_what_is_read_was_written_before(commands):
    written = {"corpora"}
    for name, command in commands.items():
        words = shlex.split(command)
        for word in (words[i + 1] for i, option in enumerate(words) if option in ("--statistics", "--model-from")):
            assert word in written, f"{name} reads {word}"
        if words[:2] == ["megamf", "evaluate"] or words[:2] == ["megamf", "modules"]:
            read = words[2] if words[1] == "evaluate" else words[3]
            assert read in written, f"{name} reads {read}"
        written |= set(re.findall(r"run\.dir=(\S+)", command))
        written |= {words[i + 1] for i, option in enumerate(words) if option in ("--json", "--output")}
        if words[:3] in (["megamf", "modules", "prune"], ["megamf", "modules", "insert"]) and "--dry-run" not in words:
            written.add(words[4])
    assert {"evaluate-base.json", "evaluate-dense.json", "evaluate-joint-inserted.json"} <= written
