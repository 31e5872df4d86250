import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamf.checkpoint import list_steps, rotate, sweep, verify
from megamf.checkpoint import rotate as rotate_function
from megamf.checkpoint.rotate import steps_to_delete

STEPS = st.sets(st.integers(0, 60), min_size=1, max_size=20)


@settings(deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 6), st.integers(0, 10), st.data())
def test_rotation_keeps_what_the_rules_name_and_nothing_else(steps, keep, keep_every, data):
    current = data.draw(st.sampled_from(sorted(steps)))
    deleted = set(steps_to_delete(steps, keep, keep_every, current))
    for step in steps:
        newer = sum(other > step for other in steps)
        stays = keep == 0 or newer < keep or step == current or (keep_every != 0 and step % keep_every == 0)
        assert (step in deleted) is not stays


@settings(deadline=None, derandomize=True)
@given(STEPS, st.integers(1, 6), st.integers(0, 10))
def test_rotating_twice_deletes_nothing_more(steps, keep, keep_every):
    current = max(steps)
    left = steps - set(steps_to_delete(steps, keep, keep_every, current))
    assert current in left
    assert steps_to_delete(left, keep, keep_every, current) == []


def test_rotation_on_disk(tmp_path, write_step):
    for step in (10, 15, 20, 25, 30):
        write_step(step)
    (tmp_path / "step-00000001").mkdir()  # no manifest: not ours to judge
    gone = rotate(tmp_path, keep=2, keep_every=20)
    assert [path.name for path in gone] == ["step-00000010", "step-00000015"]
    assert list_steps(tmp_path) == [20, 25, 30]
    assert (tmp_path / "step-00000001").exists()
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


def test_the_one_latest_names_stays(tmp_path, write_step):
    for step in (20, 30, 10):
        write_step(step)
    rotate(tmp_path, keep=1)
    assert list_steps(tmp_path) == [10, 30]


@pytest.mark.parametrize(("keep", "keep_every"), [(-1, 0), (1, -1)])
def test_negative_numbers_are_refused(tmp_path, write_step, keep, keep_every):
    write_step(1)
    with pytest.raises(ValueError, match="-1"):
        rotate_function(tmp_path, keep, keep_every)


def test_sweep_removes_leftovers_only(tmp_path, write_step):
    path = write_step(5)
    for name in (".tmp-step-00000006-x", ".old-rotated-step-00000001-x", ".old-replaced-step-00000005-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / ".tmp-latest-1").write_text("x")
    (tmp_path / ".keep").write_text("x")
    (tmp_path / ".old-link").symlink_to(path)
    assert len(sweep(tmp_path)) == 5
    assert sorted(os.listdir(tmp_path)) == [".keep", "latest", "step-00000005"]
    assert verify(path) == []
    assert sweep(tmp_path / "none") == []


def test_sweep_brings_back_a_step_whose_replacement_never_came(tmp_path, write_step):
    path = write_step(5)
    path.rename(tmp_path / ".old-replaced-step-00000005-abcd")
    (tmp_path / ".tmp-step-00000005-x").mkdir()
    assert sweep(tmp_path) == [".tmp-step-00000005-x"]
    assert verify(path) == []
