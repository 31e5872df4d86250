"""From preset, YAML file and `section.key=value` overrides to one validated RunConfig."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megamf.config.base import ConfigError
from megamf.config.model import ModelConfig
from megamf.config.run import RunConfig

# What may be said of a model that is taken from a checkpoint: the first does not touch weights, the second is what
# pruning and inserting change, so that the file of the original run still serves.
NOT_IN_WEIGHTS = {"sample_topk", "embd_pdrop", "resid_pdrop", "moe_pdrop"}
NUMBERS = {"n_att_experts", "n_mlp_experts", "n_att_experts_per_layer", "n_mlp_experts_per_layer"}


def preset_names() -> list[str]:
    """The packaged presets, sorted."""
    folder = resources.files("megamf.config") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    overrides: list[str] | None = None,
    model: ModelConfig | None = None,
) -> RunConfig:
    """Merge preset, then file, then overrides, and validate.

    model: that of a checkpoint, which is then the run's. What is said of it besides must agree, except for dropout and
    sampling (which are as they are given) and for the numbers of modules in preset and file (which the checkpoint's
    replace). Raises ConfigError naming the key, the value given and what is accepted.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        if preset not in preset_names():
            raise ConfigError(f"there is no preset {preset!r}; presets: {', '.join(preset_names())}")
        text = (resources.files("megamf.config") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        tree = _parse(text, f"preset {preset}")
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"no configuration file at {file}")
        tree = merge(tree, _parse(file.read_text(encoding="utf-8"), str(file)))
    said: dict[str, Any] = {}
    for override in overrides or []:
        said = merge(said, parse_override(override))
    if model is not None:
        tree = tree | {"model": _of_checkpoint(model, tree.get("model"), NUMBERS, "the configuration file or preset")}
        _of_checkpoint(model, said.get("model"), set(), "the command line")
    return validate(merge(tree, said))


def _of_checkpoint(model: ModelConfig, given: Any, replaced: set[str], origin: str) -> dict[str, Any]:
    """The section `model` for a checkpoint's model; ConfigError with both values where `given` contradicts it."""
    given = {key: value for key, value in (given or {}).items() if key not in replaced}
    differing = [
        f"model.{key}={value!r} in {origin}, {getattr(model, key)!r} in the checkpoint"
        for key, value in given.items()
        if key in ModelConfig.model_fields and key not in NOT_IN_WEIGHTS and value != getattr(model, key)
    ]
    if differing:
        raise ConfigError("the model of the checkpoint is another one:\n" + "\n".join(differing))
    return model.model_dump(mode="json", exclude_unset=not model.sparse) | given


def validate(tree: dict[str, Any]) -> RunConfig:
    """Check a plain tree of sections; ConfigError lists every problem, one a line, with the value given."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(item) for item in error.errors())) from None


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` (`-` and `_` are the same in keys, the value is YAML) as a nested tree."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None
    if isinstance(tree, str):
        tree = _number(tree)
    for part in reversed(key.strip().replace("-", "_").split(".")):
        tree = {part: tree}
    return tree


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: sections merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def dump(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def to_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON types; expert fields of a dense model are left out."""
    tree = config.model_dump(mode="json")
    if not config.model.sparse:
        given = config.model.model_dump(mode="json", exclude_unset=True)
        tree["model"] = {"kind": config.model.kind, **given}
    return tree


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} must hold sections (a mapping), not {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last one."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        value = loader.construct_object(value_node, deep=True)
        if key in seen:
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: key {key!r} is given twice: {seen[key]!r} and {value!r}"
            )
        seen[key] = _number(value) if isinstance(value, str) else value
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def _number(text: str) -> Any:
    """YAML 1.1 reads `3e-4` as a string; everybody means the number."""
    if text[:1] in "+-.0123456789" and "e" in text.lower():
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where} (value {item['input']!r})"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {item['input']!r})"
