import hashlib
import json
import os
import pickle
import random
import shutil

import pytest
import torch
from checkpoint_samples import MODULES
from safetensors.torch import load_file, save_file

from megamf.checkpoint import Checkpoint, DamagedCheckpoint, Problem, newest_good, verify

RNG = random.Random(0)


def reseal(path, change):
    """Change the manifest and give it a fitting checksum: a forger's manifest."""
    tree = json.loads((path / "manifest.json").read_text())
    change(tree)
    content = json.dumps(tree).encode()
    (path / "manifest.json").write_bytes(content)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


def read_all(path):
    with Checkpoint(path) as checkpoint:
        for group in checkpoint.groups:
            for name in checkpoint.names(group):
                checkpoint.tensor(name, group)


def test_the_manifest_checksum_is_in_the_form_of_sha256sum(write_step):
    path = write_step(5)
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert (path / "manifest.sha256").read_text() == f"{digest}  manifest.json\n"


def test_one_flipped_byte_anywhere_is_found_by_verify_and_by_loading(write_step):
    path = write_step(5)
    assert verify(path) == []
    names = sorted(os.listdir(path))
    assert {"manifest.json", "manifest.sha256", "state.json", "model.json", "modules.json"} < set(names)
    for name in names:
        good = (path / name).read_bytes()
        for position in {0, len(good) - 1, *(RNG.randrange(len(good)) for _ in range(6))}:
            bad = bytearray(good)
            bad[position] ^= 1 << RNG.randrange(8)
            (path / name).write_bytes(bad)
            problems = verify(path)
            named = {"manifest.json", "manifest.sha256"} if name.startswith("manifest") else {name}
            assert {problem.file for problem in problems} <= named and problems, (name, position)
        (path / name).write_bytes(good)
    read_all(path)


def test_a_flipped_byte_of_a_tensor_is_refused_when_it_is_read(write_step):
    path = write_step(5)
    shard = sorted(path.glob("*.safetensors"))[1]
    good = shard.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for position in (start, len(good) - 1, RNG.randrange(start, len(good))):
        shard.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(DamagedCheckpoint, match=shard.name):
            read_all(path)


@pytest.mark.parametrize("kind", ["rank-00000-01.safetensors", "state.json", "manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("damage", ["truncate", "append", "remove", "empty"])
def test_wrong_sizes_and_missing_files_are_found_at_opening(write_step, kind, damage):
    before, path = write_step(4), write_step(5)
    file = path / kind
    content = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes({"truncate": content[:-1], "append": content + b" ", "empty": b""}[damage])
    problems = verify(path)
    assert problems and problems[0].file.startswith(kind[:8])
    with pytest.raises(DamagedCheckpoint, match=f"{kind[:8]}.*The one before is {before}"):
        Checkpoint(path)


def test_extra_files_are_told_but_do_not_stop_loading(write_step):
    path = write_step(5)
    (path / "notes.txt").write_text("x")
    assert verify(path) == [Problem("notes.txt", "is not in the manifest", fatal=False)]
    assert newest_good(path.parent) == path
    read_all(path)


def test_files_of_another_run_are_refused(tmp_path, write_step):
    """Same model, same sizes: only the content tells them apart."""
    path = write_step(5, seed=1, run_id="one")
    other = shutil.copytree(path, tmp_path / "kept" / path.name)
    path = write_step(5, seed=2, run_id="two")
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(other / name, path / name)
    assert {problem.file for problem in verify(path)} >= {file.name for file in path.glob("*.safetensors")}
    with pytest.raises(DamagedCheckpoint, match="was written by"):
        read_all(path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/../b.safetensors", ".."])
def test_a_manifest_cannot_point_outside(tmp_path, write_step, name):
    path = write_step(5)
    shutil.copy(path / "rank-00000-00.safetensors", tmp_path / "outside.safetensors")

    def point_outside(tree):
        tree["files"][name] = tree["files"].pop("rank-00000-00.safetensors")
        for entry in tree["tensors"].values():
            if entry["file"] == "rank-00000-00.safetensors":
                entry["file"] = name

    reseal(path, point_outside)
    assert [problem.file for problem in verify(path)] == ["manifest.json"]
    with pytest.raises(DamagedCheckpoint, match="plain name"):
        Checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(version=2), "format version 2, this megamf reads version 1"),
        (lambda tree: tree.update(surprise=1), "surprise"),
        (lambda tree: tree.pop("step"), "step: Field required"),
    ],
)
def test_a_manifest_that_is_not_understood_says_why(write_step, change, message):
    path = write_step(5)
    reseal(path, change)
    with pytest.raises(DamagedCheckpoint, match=message):
        Checkpoint(path)
    assert verify(path)[0].file == "manifest.json"


def test_the_error_travels_between_processes(write_step):
    path = write_step(5)
    (path / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint) as caught:
        Checkpoint(path)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.file, copy.path) == (str(caught.value), "state.json", path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path, write_step):
    path = write_step(5)
    (path / "state.json").rename(tmp_path / "elsewhere")
    (path / "state.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="not a regular file"):
        Checkpoint(path)


def test_tables_that_contradict_the_files_are_found(write_step):
    path = write_step(5)
    name = "exp_avg/transformer.wte.weight"
    reseal(path, lambda tree: tree["tensors"].pop(name))
    assert any(name in problem.what for problem in verify(path))


def test_a_resealed_shard_of_another_attempt_is_found(write_step):
    path = write_step(5)
    shard = path / "rank-00000-00.safetensors"
    save_file(load_file(shard), shard, metadata={"attempt": "other"})
    content = shard.read_bytes()

    def reseal_shard(tree):
        tree["total_bytes"] += len(content) - tree["files"][shard.name]["size"]
        tree["files"][shard.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    reseal(path, reseal_shard)
    assert [problem.file for problem in verify(path)] == [shard.name]


def test_a_renamed_step_directory_is_told(write_step):
    path = write_step(5)
    path = path.rename(path.with_name("step-00000006"))
    assert "is of step 5" in verify(path)[0].what
    copy = shutil.copytree(path, path.with_name("my-model"))
    assert verify(copy) == []


@pytest.mark.parametrize("rows", [[], [MODULES[0].model_dump()] * 2, {"a": 1}, [{"layer": 0}]])
def test_a_module_table_that_does_not_fit_is_found(write_step, rows):
    path = write_step(5)
    content = json.dumps(rows).encode()
    (path / "modules.json").write_bytes(content)

    def reseal_table(tree):
        tree["total_bytes"] += len(content) - tree["files"]["modules.json"]["size"]
        tree["files"]["modules.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    reseal(path, reseal_table)
    assert [problem.file for problem in verify(path)] == ["modules.json"]


def test_ranks_share_the_tensor_files_and_progress_counts_all_bytes(write_step):
    path = write_step(5)
    damaged = sorted(file.name for file in path.glob("*.safetensors"))
    for name in damaged:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    read = []
    shares = [verify(path, rank=rank, num_ranks=3, progress=read.append) for rank in range(3)]
    assert sorted(problem.file for share in shares for problem in share) == damaged
    assert all(0 < len(share) < len(damaged) for share in shares)
    assert sum(read) == sum((path / name).stat().st_size for name in damaged)


def test_newest_good_passes_over_damage(tmp_path, write_step):
    paths = [write_step(step) for step in (1, 2, 3)]
    shard = paths[2] / "rank-00000-00.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_good(tmp_path) == paths[1]
    assert newest_good(tmp_path, full=False) == paths[2]  # sizes alone do not tell
    shard.write_bytes(content[:-1])
    assert newest_good(tmp_path, full=False) == paths[1]
    assert newest_good(tmp_path, before=2) == paths[0]
    assert newest_good(tmp_path, before=1) is None
    assert newest_good(tmp_path / "none") is None


def test_no_pickle_is_ever_read(write_step, tmp_path):
    path = write_step(5)
    shard = path / "rank-00000-00.safetensors"
    torch.save({"a": torch.ones(2)}, shard)
    content = shard.read_bytes()

    def reseal_shard(tree):
        tree["total_bytes"] += len(content) - tree["files"][shard.name]["size"]
        tree["files"][shard.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    reseal(path, reseal_shard)
    assert "no safetensors file" in verify(path)[0].what
    with pytest.raises(DamagedCheckpoint, match=shard.name):
        read_all(path)
