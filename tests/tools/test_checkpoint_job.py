import json

import pytest
import torch

from megamf.checkpoint import GROUPS, Checkpoint, module_table, reshard, save, verify
from megamf.cli import run
from megamf.errors import UserError
from megamf.tools.checkpoint import main


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with the steps 3 and 6 of a model of 2 layers with 3 MLP modules."""
    tensors = {}
    for group in GROUPS:
        tensors[f"{group}/lm_head.weight"] = torch.ones(7, 4)
        for layer in range(2):
            for index in range(3):
                tensors[f"{group}/transformer.h.{layer}.mlpf.experts.weight.{index}"] = torch.ones(4, 5)
    for step in (3, 6):
        state = {"step": step, "tokens": 123456 * step, "random": {"seed": 1}}
        save(tmp_path / "checkpoints", step, tensors, state, module_table(2, 0, 3), {"n_layer": 2}, run_id="the-run")
    return tmp_path


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_show_tells_the_main_facts(run_dir, capsys):
    assert run(main, ["show", str(run_dir)]) == 0
    out = capsys.readouterr().out
    for text in ("740,736", "the-run", "n_layer = 2", "148", "exp_avg_sq", "592 bytes", "0-1", "3 each", "3 trained"):
        assert text in out
    assert "lm_head.weight" not in out


def test_show_lists_logical_tensors(run_dir, capsys):
    assert run(main, ["show", "--tensors", str(run_dir / "checkpoints")]) == 0
    assert "3 x 4 x 5" in capsys.readouterr().out


def test_show_json(run_dir, capsys):
    assert run(main, ["show", "--json", "--tensors", str(run_dir / "checkpoints" / "step-00000003")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 3 and facts["parameters"] == 7 * 4 + 2 * 3 * 4 * 5
    assert facts["groups"]["master"] == {"tensors": 3, "dtypes": ["float32"], "bytes": 4 * 148}
    assert facts["tensors"]["exp_avg"]["transformer.h.1.mlpf.experts.weight"] == [3, 4, 5]
    assert facts["modules"][0] == {"layer": 0, "kind": "mlp", "count": 3, "provenance": {"trained": 3}}


def test_verify_good_and_damaged(run_dir, capsys):
    assert run(main, ["verify", str(run_dir), "--all"]) == 0
    assert capsys.readouterr().out.count(": good") == 2
    flip(run_dir / "checkpoints" / "step-00000003" / "rank-00000-00.safetensors")
    assert run(main, ["verify", str(run_dir)]) == 0  # the latest one is good
    capsys.readouterr()
    assert run(main, ["verify", "--all", str(run_dir)]) == 1
    out = capsys.readouterr().out
    assert "step-00000003: damaged" in out and "rank-00000-00.safetensors" in out and "step-00000006: good" in out
    flip(run_dir / "checkpoints" / "step-00000006" / "manifest.json")
    assert run(main, ["verify", str(run_dir)]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_verify_with_a_wrong_latest(run_dir, capsys):
    (run_dir / "checkpoints" / "latest").write_text("nonsense")
    assert run(main, ["verify", str(run_dir)]) == 1
    assert "good" not in capsys.readouterr().out
    assert run(main, ["verify", "--all", str(run_dir)]) == 1
    assert capsys.readouterr().out.count(": good") == 2


@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_path_without_checkpoint_is_wrong_usage(tmp_path, capsys, action):
    assert run(main, [action, str(tmp_path / "none")]) == 2
    assert "no checkpoint directory" in capsys.readouterr().err
    assert run(main, [action, str(tmp_path)]) == 2


def test_show_refuses_a_damaged_checkpoint_and_names_the_one_before(run_dir, capsys):
    (run_dir / "checkpoints" / "step-00000006" / "state.json").unlink()
    assert run(main, ["show", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "state.json: is missing" in error and "step-00000003" in error


def test_threads_must_be_positive(run_dir, capsys):
    assert run(main, ["verify", str(run_dir), "--threads", "0"]) == 2
    assert "--threads=0" in capsys.readouterr().err


def test_reshard(run_dir, tmp_path, capsys):
    source = run_dir / "checkpoints" / "step-00000003"
    assert run(main, ["reshard", str(source), str(tmp_path / "whole")]) == 0
    assert "1 tensor files" in capsys.readouterr().out
    assert run(main, ["reshard", str(source), str(tmp_path / "weights"), "--weights-only"]) == 0
    with Checkpoint(source) as old, Checkpoint(tmp_path / "whole") as new, Checkpoint(tmp_path / "weights") as light:
        assert (new.step, new.state, new.modules, new.model) == (old.step, old.state, old.modules, old.model)
        assert new.manifest.run_id == old.manifest.run_id and new.groups == old.groups and light.groups == ("weights",)
        for group in old.groups:
            assert new.names(group) == old.names(group)
            assert all(torch.equal(new.tensor(name, group), old.tensor(name, group)) for name in old.names(group))
    assert not verify(tmp_path / "whole" / "step-00000003")
    assert run(main, ["reshard", str(source), str(tmp_path / "whole")]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err
    flip(source / "rank-00000-00.safetensors")
    assert run(main, ["reshard", str(source), str(tmp_path / "third")]) == 2
    assert "rank-00000-00.safetensors" in capsys.readouterr().err
    assert not list((tmp_path / "third").glob("*"))


def test_files_of_another_size(tmp_path):
    tensors = {f"weights/a{i}.weight": torch.full((64, 64), float(i)) for i in range(10)}
    path = save(tmp_path / "one", 1, tensors, {}, [], {}, run_id="r")
    with Checkpoint(path) as source:
        assert source.num_bytes(("weights",)) == 10 * 64 * 64 * 4 and source.num_bytes(("exp_avg",)) == 0
        split = reshard(source, tmp_path / "split", max_file_bytes=3 * 64 * 64 * 4)
        assert len(list(split.glob("*.safetensors"))) == 4
        with Checkpoint(split) as copy:
            back = reshard(copy, tmp_path / "back")
        assert len(list(back.glob("*.safetensors"))) == 1
        with Checkpoint(back) as copy:
            assert all(torch.equal(copy.tensor(name), source.tensor(name)) for name in source.names())
        with pytest.raises(UserError, match="cannot be kept"):
            reshard(source, tmp_path / "no", groups=("weights", "exp_avg"))
