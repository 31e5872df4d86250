import os

import pytest

from megamf.checkpoint import files
from megamf.errors import UserError


def test_replacing_a_file_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "latest"
    files.replace_file(target, b"one")
    files.replace_file(target, b"two")
    assert target.read_bytes() == b"two"

    def failing(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        files.replace_file(target, b"three")
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["latest"]


def test_the_directory_may_be_renamed_as_soon_as_the_file_is_there(tmp_path, monkeypatch):
    """What rank 0 does when the mark it waits for is the last one."""
    (tmp_path / "before").mkdir()
    replace = os.replace

    def replace_then_rename(source, target):
        replace(source, target)
        os.rename(tmp_path / "before", tmp_path / "after")

    monkeypatch.setattr(files.os, "replace", replace_then_rename)
    files.replace_file(tmp_path / "before" / "mark", b"x")
    assert (tmp_path / "after" / "mark").read_bytes() == b"x"


def test_a_removed_tree_leaves_its_name_before_its_content_goes(tmp_path, monkeypatch):
    tree = tmp_path / "step-00000001"
    tree.mkdir()
    (tree / "a").write_text("x")
    seen = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, ignore_errors: seen.append((path, tree.exists())))
    files.remove_tree(tree)
    ((hidden, still_there),) = seen
    assert not still_there
    assert hidden.name.startswith(".old-step-00000001-") and (hidden / "a").read_text() == "x"


def test_removing_what_is_not_there_is_no_error(tmp_path):
    files.remove_tree(tmp_path / "none")
    assert os.listdir(tmp_path) == []


def test_space_is_asked_of_the_nearest_existing_parent(tmp_path):
    far = tmp_path / "a" / "b"
    files.check_space(far, 0)
    with pytest.raises(UserError, match=f"{10**18:,} bytes needed"):
        files.check_space(far, 10**18)
    assert not far.exists()
