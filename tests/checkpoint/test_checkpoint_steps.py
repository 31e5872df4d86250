import pytest

from megamf.checkpoint import DamagedCheckpoint, latest, list_steps, resolve
from megamf.errors import UserError


def test_only_complete_steps_are_listed(tmp_path, write_step):
    for step in (20, 3):
        write_step(step)
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / ".tmp-step-00000040-n").mkdir()
    (tmp_path / ".tmp-step-00000040-n" / "manifest.json").write_text("{}")
    (tmp_path / "notes").write_text("x")
    assert list_steps(tmp_path) == [3, 20]
    assert list_steps(tmp_path / "none") == []


def test_latest_is_what_the_file_names_else_the_newest(tmp_path, write_step):
    assert latest(tmp_path) is None
    for step in (20, 3):
        write_step(step)
    assert latest(tmp_path) == tmp_path / "step-00000003"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == tmp_path / "step-00000020"


@pytest.mark.parametrize("content", [b"", b"../../etc", b"step-00000009", b"/tmp/step-00000003", b"\xff\xfe"])
def test_a_wrong_latest_is_damage_and_names_the_newest(tmp_path, write_step, content):
    path = write_step(3)
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"newest complete checkpoint is .*step-00000003"):
        latest(tmp_path)
    assert resolve(path) == path


def test_resolve_accepts_a_step_a_checkpoints_and_a_run_directory(tmp_path, write_step):
    path = write_step(3)
    assert resolve(path) == resolve(tmp_path) == resolve(tmp_path / "latest") == path
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve(run)
    (run / "checkpoints").symlink_to(tmp_path)
    assert resolve(run).resolve() == path
    with pytest.raises(UserError, match="no checkpoint directory"):
        resolve(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint directory"):
        resolve(path / "state.json")
