"""Hugging Face folders in and out of the compression jobs: what is loaded, and what is written whole or not at all.

A model of a class of transformers is written as a plain folder. One of megamf's portable classes is written with
the Python files that define it, and loads with `trust_remote_code=True`.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import megamf.hf  # noqa: F401  (registers the ModuleFormer classes)
from megamf.checkpoint import check_space
from megamf.errors import UserError
from megamf.hf.convert import ARCHITECTURE, AUTO_MAP, PORTABLE

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
RELATIVE = re.compile(r"^from \.(\w+) import", re.MULTILINE)
REPORT = "pruning.json"


def load_causal_lm(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Any]:
    """(model in evaluation mode, tokenizer) of a Hugging Face folder; `dtype`: of the weights, as stored by default.

    No code of the folder is run. Raises UserError where there is no such folder, or none that can be loaded so.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no Hugging Face folder: it has no config.json. A megamf checkpoint becomes one by "
            "`megamf export-hf`"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded as a causal language model: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} has no tokenizer that can be loaded: {error}") from None
    return model.to(device).eval(), tokenizer


def refuse_existing(out: Path) -> None:
    """Raise UserError where `out` is something already, or would lie in a folder that does not exist."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name another folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"the folder of {out} does not exist")


def save_folder(
    model: nn.Module, out: Path | str, *, source: Path | None, card: str, report: Mapping[str, Any], name: str = REPORT
) -> bool:
    """Write `model` as a Hugging Face folder -> whether it is a plain one, that needs no code of its own.

    The tokenizer and chat template of `source` are carried over, the generation settings are the model's. card: of the
    README.md. report: written as JSON into the file `name`. The folder appears whole or not at all. Raises UserError
    where `out` exists and where there is no room for it.
    """
    out = Path(out)
    refuse_existing(out)
    check_space(out, sum(tensor.nbytes for tensor in model.state_dict().values()))
    files, auto_map = code_of(model)
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    part.mkdir()
    try:
        model.save_pretrained(part)
        _edit_config(part / "config.json", type(model).__name__, auto_map)
        for package, file in files:
            text = (resources.files(package) / file).read_text(encoding="utf-8")
            (part / file).write_text(text, encoding="utf-8")
        for file in TOKENIZER_FILES:
            if source is not None and (Path(source) / file).is_file():
                shutil.copyfile(Path(source) / file, part / file)
        (part / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return not auto_map


def _edit_config(path: Path, architecture: str, auto_map: Mapping[str, str]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree.pop("auto_map", None)
    tree["architectures"] = [architecture]
    if auto_map:
        tree["auto_map"] = dict(auto_map)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def code_of(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(package, file) of every Python file that a folder of this model needs, and its `auto_map`; both may be empty."""
    cls = type(model)
    if cls.__name__ == ARCHITECTURE and cls.__module__ == "megamf.hf.modeling":
        return [("megamf.hf.portable", file) for file in PORTABLE], dict(AUTO_MAP)
    package, _, module = cls.__module__.rpartition(".")
    if not package.startswith("megamf.") or not package.endswith(".portable"):
        return [], {}
    config = cls.config_class
    wanted, found = [module, config.__module__.rpartition(".")[2]], []
    while wanted:
        file = f"{wanted.pop()}.py"
        if (package, file) not in found:
            found.append((package, file))
            wanted += RELATIVE.findall((resources.files(package) / file).read_text(encoding="utf-8"))
    auto_map = {
        "AutoConfig": f"{config.__module__.rpartition('.')[2]}.{config.__name__}",
        "AutoModelForCausalLM": f"{module}.{cls.__name__}",
    }
    return found, auto_map


def model_card(name: str, base: str, rows: Mapping[str, str], told: str, plain: bool) -> str:
    """A model card: what was done (`told`), the facts in `rows`, and how to load the folder."""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    option = "" if plain else ", trust_remote_code=True"
    code = (
        ""
        if plain
        else "\n`trust_remote_code` runs the Python files of this folder, which need torch and transformers only.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags:
- pruned
---

# {name}

{told} The licence is that of {base}. Its quality, biases and safety were not evaluated beyond what stands here.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{option})
tokenizer = AutoTokenizer.from_pretrained(".")
```
{code}"""
