import json

import pytest

from megamf.callbacks.metrics import forget_after, require_wandb
from megamf.config import ConfigError, load_config


def test_lines_after_the_resumed_step_and_torn_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    forget_after(path, 2, 16)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_yet(tmp_path):
    forget_after(tmp_path / "metrics.jsonl", 0, 0)
    assert not list(tmp_path.iterdir())


def test_wandb_asked_for_but_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"megamf\[wandb\]"):
        require_wandb(load_config(overrides=["logging.wandb=project"]))
    require_wandb(load_config())


def test_events_go_only_with_data_that_will_be_read_again(tmp_path):
    """Skipped after the step that the run went back to, but of data that it does not go back to."""
    path = tmp_path / "metrics.jsonl"
    records = [
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 1.0},
        {"step": 3, "event": "skip", "consumed_samples": 32},
        {"step": 3, "event": "skip", "consumed_samples": 40},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    forget_after(path, 2, 32)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [records[0], records[2]]
