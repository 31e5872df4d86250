import pytest
from pydantic import ValidationError

from megamf.checkpoint.schema import (
    FileEntry,
    Manifest,
    Module,
    TensorEntry,
    check_module_counts,
    check_modules,
    check_tensors,
    logical_shapes,
    module_table,
    require_plain,
)


def entry(*shape, dtype="float32", file="a.safetensors"):
    return TensorEntry(file=file, dtype=dtype, shape=list(shape), crc32=0)


def manifest(**changes):
    files = {name: FileEntry(size=2, sha256="0" * 64) for name in ("state.json", "model.json", "modules.json")}
    files["a.safetensors"] = FileEntry(size=10, sha256="0" * 64)
    tree = {"megamf": "0", "run_id": "r", "attempt": "t", "step": 1, "total_bytes": 16, "files": files}
    return Manifest(**(tree | {"tensors": {"weights/x": entry(2)}} | changes))


def test_a_sound_manifest_is_accepted():
    assert manifest().tensors["weights/x"].shape == [2]


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "a\\b.safetensors"])
def test_file_names_that_leave_the_directory_are_refused(name):
    files = manifest().files | {name: FileEntry(size=0, sha256="0" * 64)}
    with pytest.raises(ValidationError, match="plain name"):
        manifest(files=files)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"weights/x": entry(2, file="b.safetensors")}},
        {"tensors": {"weights/x": entry(2, file="state.json")}},
        {"tensors": {"wrong/x": entry(2)}},
        {"total_bytes": 17},
        {"files": {}},
        {"version": 2},
        {"step": -1},
        {"step": "1"},
        {"unknown": 1},
    ],
)
def test_contradictions_are_refused(changes):
    with pytest.raises(ValidationError):
        manifest(**changes)


def test_logical_shapes_stack_experts():
    tensors = {f"weights/h.e.{i}": entry(2, 3) for i in (10, 2, 0, 1, *range(3, 10))} | {"weights/b": entry()}
    assert logical_shapes(tensors, "weights") == {"b": (), "h.e": (11, 2, 3)}
    assert logical_shapes(tensors, "master") == {}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weights/e.0": entry(2), "weights/e.2": entry(2)}, "lacks module 1"),
        ({"weights/e.1": entry(2)}, "lacks module 0"),
        ({"weights/e.0": entry(2), "weights/e.1": entry(3)}, "module 1 is"),
        ({"weights/e.0": entry(2), "weights/e.1": entry(2, dtype="int8")}, "module 1 is"),
        ({"weights/e.0": entry(2), "weights/e": entry(2)}, "both whole and in modules"),
        ({"weights/a": entry(2), "exp_avg/a": entry(3)}, "has shape"),
        ({"weights/a": entry(2), "exp_avg/b": entry(2)}, "None"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        check_tensors(tensors)


def test_module_table_names_every_module_once():
    table = module_table(2, 3, 4)
    assert [module.id for module in table if module.layer == 1 and module.kind == "attention"] == [
        "L01.attention.000",
        "L01.attention.001",
        "L01.attention.002",
    ]
    assert len(table) == 14
    check_modules(table)


@pytest.mark.parametrize(
    ("change", "message"), [({"id": "L00.mlp.000"}, "twice"), ({"index": 5, "id": "new"}, "indices")]
)
def test_bad_module_tables_are_refused(change, message):
    table = module_table(1, 0, 2)
    table[1] = Module(**(table[1].model_dump() | change))
    with pytest.raises(ValueError, match=message):
        check_modules(table)


def test_module_counts_are_those_of_the_weights():
    tensors = {f"weights/transformer.h.0.mlpf.experts.weight.{i}": entry(2, 2) for i in range(3)}
    check_module_counts(module_table(1, 0, 3), tensors)
    with pytest.raises(ValueError, match=r"layer 0 has 3 mlp modules .* 2 in the module table"):
        check_module_counts(module_table(1, 0, 2), tensors)
    with pytest.raises(ValueError, match=r"layer 1 has 0 mlp modules"):
        check_module_counts(module_table(2, 0, 3), tensors)


@pytest.mark.parametrize(
    ("value", "where"),
    [({"a": [1, {2: 3}]}, r"state\.a\[1\]"), ({"a": b"x"}, r"state\.a"), ([{1, 2}], r"state\[0\]")],
)
def test_values_that_json_would_change_are_named(value, where):
    with pytest.raises(ValueError, match=where):
        require_plain(value, "state")


def test_other_groups_may_have_some_modules_only():
    """Those that are trained; the shape is still that of the whole."""
    tensors = {f"weights/e.{i}": entry(2) for i in range(4)} | {"exp_avg/e.1": entry(2), "exp_avg/e.2": entry(2)}
    check_tensors(tensors)
    assert logical_shapes(tensors, "exp_avg") == logical_shapes(tensors, "weights") == {"e": (4, 2)}
    with pytest.raises(ValueError, match=r"exp_avg/e has shape \[5, 2\], weights/e \(4, 2\)"):
        check_tensors(tensors | {"exp_avg/e.4": entry(2)})
