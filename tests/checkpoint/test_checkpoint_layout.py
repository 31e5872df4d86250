import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamf.checkpoint import layout


@settings(deadline=None, derandomize=True)
@given(st.integers(0, layout.MAX_STEP))
def test_step_names_are_invertible_and_sort_by_step(step):
    name = layout.step_name(step)
    assert layout.step_of(name) == step
    assert len(name) == len("step-00000000")


@pytest.mark.parametrize("step", [-1, 100_000_000])
def test_steps_outside_eight_digits_are_refused(step):
    with pytest.raises(ValueError, match=str(step)):
        layout.step_name(step)


@pytest.mark.parametrize("name", ["step-1", "step-000000001", "xstep-00000001", "step-0000000a", "step-00000001\n"])
def test_other_names_are_no_steps(name):
    assert layout.step_of(name) is None


@pytest.mark.parametrize("name", ["../a", "a/b", "/etc/passwd", "..", ".", "", ".hidden", "a\\b", "a\0", "a\n", "é"])
def test_file_names_cannot_leave_the_directory(name):
    assert not layout.is_plain_file_name(name)


@pytest.mark.parametrize("nonce", ["", "a/b", "..", "a" * 65, "a b"])
def test_nonces_are_plain(nonce):
    with pytest.raises(ValueError, match="nonce"):
        layout.temporary_name(1, nonce)


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), st.integers(0, 10**6))
def test_expert_names_are_invertible(key, index):
    assert layout.split_expert(layout.expert_name(key, index)) == (key, index)


@pytest.mark.parametrize("name", ["lm_head.weight", "w.01", "w.-1", "17", "a.1.weight"])
def test_names_without_a_trailing_number_are_whole(name):
    assert layout.split_expert(name) is None


@pytest.mark.parametrize("full", ["weight/a", "a", "weights/", "weights/a b", "weights/a/b", "weights/../b", "/a"])
def test_bad_tensor_names_are_refused(full):
    with pytest.raises(ValueError, match="no tensor name"):
        layout.split_name(full)


def test_dtype_tables_agree_with_torch():
    for dtype, (name, _) in layout.DTYPES.items():
        assert getattr(torch, name) is dtype
