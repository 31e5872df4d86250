"""The JSON of a checkpoint as validated objects: manifest, module table, and the mark a rank leaves behind."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, model_validator

from megamf.checkpoint import layout

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dtype = Literal[tuple(layout.DTYPE_OF_NAME)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """One file: bytes and sha256."""

    size: NonNegativeInt
    sha256: Sha256


class TensorEntry(_Strict):
    """One stored tensor: its file, torch dtype name, shape, and crc32 of its bytes (checked at every read)."""

    file: str
    dtype: Dtype
    shape: list[NonNegativeInt]
    crc32: NonNegativeInt


class Module(_Strict):
    """One row of the module table. `index` is the place in the layer's expert tensors, `id` never changes.

    generation: which insertion brought it, counted from 1; 0 for modules that were there from the start.
    """

    layer: NonNegativeInt
    kind: Literal["attention", "mlp"]
    index: NonNegativeInt
    id: str
    provenance: Literal["trained", "inserted", "merged"] = "trained"
    origin: str | None = None
    generation: NonNegativeInt = 0
    load: dict[str, Any] | None = None


class RankMarker(_Strict):
    """What one rank wrote: `attempt` is the temporary directory's name, so that no other attempt's mark counts."""

    attempt: str
    rank: NonNegativeInt
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


class Manifest(_Strict):
    """Everything a checkpoint consists of. `total_bytes` is the sum of the sizes of `files`."""

    format: Literal["megamf-checkpoint"] = layout.FORMAT
    version: Literal[1] = layout.VERSION
    megamf: str
    run_id: str
    attempt: str
    step: Annotated[int, Field(ge=0, le=layout.MAX_STEP)]
    total_bytes: NonNegativeInt
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _closed(self) -> "Manifest":
        for name in self.files:
            if not layout.is_plain_file_name(name):
                raise ValueError(f"file name {name!r} is not a plain name inside the checkpoint")
        lacking = [name for name in layout.JSON_FILES if name not in self.files]
        if lacking:
            raise ValueError(f"lists no {', '.join(lacking)}")
        for name, entry in self.tensors.items():
            layout.split_name(name)
            if entry.file not in self.files or not entry.file.endswith(layout.SHARD_SUFFIX):
                raise ValueError(f"tensor {name} is in {entry.file!r}, which is no listed tensor file")
        total = sum(entry.size for entry in self.files.values())
        if total != self.total_bytes:
            raise ValueError(f"total_bytes={self.total_bytes}, but the files add up to {total}")
        return self


def logical_shapes(tensors: Mapping[str, TensorEntry], group: str) -> dict[str, tuple[int, ...]]:
    """State_dict key -> logical shape ([E, in, out] for expert tensors) of one group, in sorted order of keys.

    Raises ValueError where modules are missing (indices must be 0..E-1), differ in shape or dtype, or where a
    key is stored both whole and in modules. Other groups than the weights may have some modules only, those that are
    trained; E is then the weights'.
    """
    whole: dict[str, tuple[int, ...]] = {}
    experts: dict[str, dict[int, TensorEntry]] = {}
    for full, entry in tensors.items():
        found_group, name = layout.split_name(full)
        if found_group != group:
            continue
        expert = layout.split_expert(name)
        if expert is None:
            whole[name] = tuple(entry.shape)
        else:
            experts.setdefault(expert[0], {})[expert[1]] = entry
    for key, modules in experts.items():
        if key in whole:
            raise ValueError(f"{group}/{key} is stored both whole and in modules")
        lowest, count = min(modules), max(modules) + 1
        if group == layout.WEIGHTS:
            missing = sorted(set(range(count)) - set(modules))
            if missing:
                raise ValueError(f"{group}/{key} lacks module {missing[0]} ({len(missing)} missing of {count})")
        while group != layout.WEIGHTS and layout.full_name(layout.expert_name(key, count)) in tensors:
            count += 1
        first = modules[lowest]
        for index, entry in sorted(modules.items()):
            if (entry.shape, entry.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{group}/{key}: module {index} is {entry.dtype} {entry.shape}, "
                    f"module {lowest} is {first.dtype} {first.shape}"
                )
        whole[key] = (count, *first.shape)
    return dict(sorted(whole.items()))


def check_tensors(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError unless the weights are complete in themselves and every group fits them in names and shapes."""
    weights = logical_shapes(tensors, layout.WEIGHTS)
    for group in layout.GROUPS[1:]:
        for key, shape in logical_shapes(tensors, group).items():
            if weights.get(key) != shape:
                raise ValueError(f"{group}/{key} has shape {list(shape)}, {layout.WEIGHTS}/{key} {weights.get(key)}")


def check_modules(modules: Iterable[Module]) -> None:
    """Raise ValueError unless ids are unique and indices run 0..n-1 in every layer and kind."""
    ids: set[str] = set()
    places: dict[tuple[int, str], list[int]] = {}
    for module in modules:
        if module.id in ids:
            raise ValueError(f"module id {module.id!r} occurs twice")
        ids.add(module.id)
        places.setdefault((module.layer, module.kind), []).append(module.index)
    for (layer, kind), indices in places.items():
        if sorted(indices) != list(range(len(indices))):
            raise ValueError(
                f"layer {layer} {kind}: module indices {sorted(indices)[:8]}... are not 0..{len(indices) - 1}"
            )


def module_table(num_layers: int, num_attention: int | Sequence[int], num_mlp: int | Sequence[int]) -> list[Module]:
    """The table of a freshly trained model, all modules `trained`. Numbers of modules: of every layer, or a list."""

    def of(count: int | Sequence[int], layer: int) -> int:
        return count if isinstance(count, int) else count[layer]

    return [
        Module(layer=layer, kind=kind, index=index, id=layout.module_id(layer, kind, index))
        for layer in range(num_layers)
        for kind, count in (("attention", num_attention), ("mlp", num_mlp))
        for index in range(of(count, layer))
    ]


def require_plain(value: Any, where: str) -> None:
    """Raise ValueError naming the place of the first value that JSON would refuse or silently change."""
    if value is None or isinstance(value, str | bool | int | float):
        return
    if isinstance(value, list | tuple):
        for position, item in enumerate(value):
            require_plain(item, f"{where}[{position}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}; JSON keys are strings")
            require_plain(item, f"{where}.{key}")
        return
    raise ValueError(f"{where} is a {type(value).__name__}; a checkpoint holds plain JSON values only")


_ROWS = TypeAdapter(list[Module])
_MODULE_KEY = re.compile(r"(?:.*\.)?h\.(\d+)\.(attn\.q_proj|mlpf)\.experts\.weight")


def check_module_counts(modules: Iterable[Module], tensors: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError unless the table has a row for every module among the weights, layer by layer."""
    stored: Counter[tuple[int, str]] = Counter()
    for key, shape in logical_shapes(tensors, layout.WEIGHTS).items():
        if match := _MODULE_KEY.fullmatch(key):
            stored[int(match[1]), "mlp" if match[2] == "mlpf" else "attention"] = shape[0]
    listed = Counter((module.layer, module.kind) for module in modules)
    for layer, kind in sorted(stored.keys() | listed.keys()):
        if stored[layer, kind] != listed[layer, kind]:
            raise ValueError(
                f"layer {layer} has {stored[layer, kind]} {kind} modules among its weights, "
                f"but {listed[layer, kind]} in the module table"
            )


def module_rows(content: bytes) -> list[Module]:
    """The rows of a `modules.json`. Raises ValueError (pydantic's) where they are none."""
    return _ROWS.validate_json(content)
