"""Export to and import from the public ModuleFormer layout, one tensor at a time, every tensor exactly once."""

import importlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM

from megamf.checkpoint import WEIGHTS, check_space, expert_name, full_name, list_steps, module_table, save
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.evaluate.weights import CheckpointWeights, is_public_folder
from megamf.hf import gpt_neox
from megamf.hf.card import model_card
from megamf.hf.configuration import to_public
from megamf.hf.folder import FolderWeights, parameter_shapes
from megamf.hf.layout import BUFFER, Entry, mask_buffer, plan_shards, public_entries, shard_names
from megamf.hf.streaming import INDEX, write_file
from megamf.hf.tokenizer import TokenizerReport, export_tokenizer

PORTABLE = ("configuration_moduleformer.py", "modeling_moduleformer.py")
ARCHITECTURE = "ModuleFormerForCausalLM"
AUTO_MAP = {
    "AutoConfig": "configuration_moduleformer.ModuleFormerConfig",
    "AutoModel": "modeling_moduleformer.ModuleFormerModel",
    "AutoModelForCausalLM": f"modeling_moduleformer.{ARCHITECTURE}",
    "AutoModelForSequenceClassification": "modeling_moduleformer.ModuleFormerForSequenceClassification",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written: `total_bytes` of tensors in `num_tensors`, `files`, and how the tokenizer was carried over."""

    folder: Path
    dtype: str
    num_tensors: int
    num_parameters: int
    total_bytes: int
    files: list[str]
    tokenizer: TokenizerReport | None


def export_hf(
    checkpoint: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = None,
    buffers: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    on_tensor: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the weights of a megamf checkpoint as a folder that Hugging Face and the public package load.

    `dtype`: of the files (default: as stored). `buffers`: with the two constant masks a layer of the released files,
    which the public package expects. `on_tensor(done, total)` in bytes. The folder appears whole or not at all.
    Raises UserError for dense baselines, tensors that are missing or too many, another tokenizer than the
    model's, a folder that exists (without `overwrite`) and a full disk.
    """
    out = Path(out)
    with CheckpointWeights(Path(checkpoint), dtype) as weights:
        _refuse_existing(out, overwrite, weights.path)
        model = weights.model
        shapes = parameter_shapes(model)
        public = _config(model, weights.checkpoint.state, buffers)
        weights.check(shapes)
        entries, own = _entries(model, {name: dtype or weights.dtype(name) for name in shapes}, buffers)
        total = sum(entry.num_bytes for entry in entries)
        check_space(out, total)
        main_dtype = str(entries[0].dtype).removeprefix("torch.")
        shards = plan_shards(entries, max_shard_bytes)
        names = shard_names(len(shards))
        part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        part.mkdir(parents=True)
        try:
            report = None
            if tokenizer is not None:
                report = export_tokenizer(Path(tokenizer), part, model.vocab_size, weights.tokenizer, weights.path)
                public |= {"bos_token_id": report.bos_id, "eos_token_id": report.eod_id}
            _write_weights(part, lambda entry: weights.read(own[entry.name]), shards, names, total, on_tensor)
            public |= {"torch_dtype": main_dtype}
            _write_json(part / "config.json", dict(sorted(public.items())))
            _write_json(part / "generation_config.json", _generation(public))
            for file in PORTABLE if model.sparse else ():
                text = (resources.files("megamf.hf.portable") / file).read_text(encoding="utf-8")
                (part / file).write_text(text, encoding="utf-8")
            card = model_card(out.name, model, weights.checkpoint.state, main_dtype, report)
            (part / "README.md").write_text(card, encoding="utf-8")
            _replace(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return ExportReport(out, main_dtype, len(entries), parameters, total, names, report)


def _config(model: ModelConfig, state: dict[str, Any], buffers: bool) -> dict[str, Any]:
    """config.json but for what depends on the files."""
    if model.kind == "gpt_neox":
        if buffers:
            raise UserError("the constant masks are those of released ModuleFormer files; a GPT-NeoX has none")
        return gpt_neox.to_public(model) | {"architectures": [gpt_neox.ARCHITECTURE]}
    return to_public(model, **_aux_loss(state)) | {"architectures": [ARCHITECTURE], "auto_map": AUTO_MAP}


def _entries(model: ModelConfig, dtypes: dict[str, torch.dtype], buffers: bool) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of the files in their order, and megamf's name of each but of the constant masks."""
    if model.kind != "gpt_neox":
        return public_entries(model, dtypes, buffers=buffers), {name: name for name in dtypes}
    own = {gpt_neox.public_name(name): name for name in dtypes}
    shapes = parameter_shapes(model)
    return [Entry(name, shapes[ours], dtypes[ours]) for name, ours in own.items()], own


def _write_weights(
    part: Path,
    read: Callable[[Entry], torch.Tensor],
    shards: list[list[Entry]],
    names: list[str],
    total: int,
    on_tensor: Callable[[int, int], None] | None,
) -> None:
    done = 0

    def get(entry: Entry) -> torch.Tensor:
        nonlocal done
        tensor = mask_buffer(entry) if BUFFER.fullmatch(entry.name) else read(entry).to(entry.dtype)
        done += entry.num_bytes
        if on_tensor is not None:
            on_tensor(done, total)
        return tensor

    for name, entries in zip(names, shards):
        write_file(part / name, entries, get)
    if len(shards) > 1:
        of = {entry.name: name for name, entries in zip(names, shards) for entry in entries}
        _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(of.items()))})


def import_hf(
    folder: Path | str,
    out: Path | str,
    *,
    pickled: bool = False,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a public-layout or GPT-NeoX folder as a megamf checkpoint of step 0 below `out`; weights only, as stored.

    Returns the step directory: `megamf evaluate` reads it, `checkpoint.init_from` starts a run from it.
    `pickled`: read pytorch_model.bin, whole or in shards, in place of safetensors. `on_tensor(done, total)` counts
    tensors. Raises UserError for pickled weights not asked for, tensors that are missing, unknown or of another shape
    than config.json describes, and an `out` that already holds checkpoints.
    """
    folder, out = Path(folder), Path(out)
    if list_steps(out):
        raise UserError(f"{out} already holds checkpoints: name another folder")
    with FolderWeights(folder, pickled=pickled) as weights:
        shapes = parameter_shapes(weights.model)
        weights.check(shapes)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for count, name in enumerate(shapes, start=1):
                tensor = weights.read(name)
                if len(tensor.shape) == 3:
                    for expert, weight in enumerate(tensor):
                        yield full_name(expert_name(name, expert), WEIGHTS), weight
                else:
                    yield full_name(name, WEIGHTS), tensor
                if on_tensor is not None:
                    on_tensor(count, len(shapes))

        model = weights.model
        state = {
            "step": 0,
            "consumed_tokens": 0,
            "origin": {"format": "public ModuleFormer layout", "name": folder.resolve().name},
        }
        if weights.tokenizer is not None:
            state["tokenizer"] = weights.tokenizer
        modules = []
        if weights.config is None:
            state["origin"]["format"] = "GPT-NeoX layout"
        else:
            loss = weights.config
            state["losses"] = {"balance": loss.aux_loss_type, "balance_weight": loss.aux_loss_weight}
            modules = module_table(
                model.n_layer,
                model.n_att_experts_per_layer or model.n_att_experts,
                model.n_mlp_experts_per_layer or model.n_mlp_experts,
            )
        tree = model.model_dump(mode="json", exclude_unset=not model.sparse)
        return save(out, 0, tensors(), state, modules, tree, run_id=uuid.uuid4().hex)


def max_logit_difference(checkpoint: Path | str, folder: Path | str, tokens: int = 64, seed: int = 0) -> float:
    """Largest absolute difference of logits, in float32, between the checkpoint and the exported folder.

    The checkpoint runs in megamf, rounded to the folder's dtype first; the folder in its own modelling file, or in
    transformers where that has the model. The input is one batch of two rows of random tokens, one of them padded on
    the left; padding itself is not compared.
    """
    folder = Path(folder)
    if all((folder / file).is_file() for file in PORTABLE):
        with _classes_of(folder) as module:
            exported = getattr(module, ARCHITECTURE).from_pretrained(folder, dtype="auto")
    else:
        exported = GPTNeoXForCausalLM.from_pretrained(folder, dtype="auto")
    stored = exported.dtype
    exported = exported.float().eval()
    model, config = load_model(checkpoint, stored)
    model = model.float()
    input_BT = torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(seed))
    mask_BT = torch.ones_like(input_BT)
    mask_BT[1, : tokens // 4] = 0
    with torch.no_grad():
        theirs = exported(input_ids=input_BT, attention_mask=mask_BT).logits
        ours = model.logits(model(input_BT, key_mask_BS=mask_BT.bool()).hidden_BTD)
    return (ours - theirs)[mask_BT.bool()].abs().max().item()


@contextmanager
def _classes_of(folder: Path) -> Iterator[ModuleType]:
    """The modelling file of an export, imported from a copy under a name of its own.

    The Auto classes would prefer megamf's own classes, and they keep copies in the user's cache.
    """
    name = f"export_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / name
        package.mkdir()
        (package / "__init__.py").touch()
        for file in PORTABLE:
            shutil.copyfile(folder / file, package / file)
        sys.path.insert(0, place)
        try:
            yield importlib.import_module(f"{name}.{PORTABLE[1].removesuffix('.py')}")
        finally:
            sys.path.remove(place)
            for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
                del sys.modules[loaded]


def _aux_loss(state: dict[str, Any]) -> dict[str, Any]:
    """aux_loss_type and aux_loss_weight of the training that the checkpoint comes from."""
    losses = state.get("config", {}).get("losses") or state.get("losses") or {}
    kind = losses.get("balance", "none")
    if kind == "none":
        return {"aux_loss_type": "mi", "aux_loss_weight": 0.0}
    return {"aux_loss_type": kind, "aux_loss_weight": float(losses.get("balance_weight", 0.0))}


def _generation(public: dict[str, Any]) -> dict[str, Any]:
    ids = {"bos_token_id": public["bos_token_id"], "eos_token_id": public["eos_token_id"]}
    return {"_from_model_config": True, **ids, "pad_token_id": public["eos_token_id"]}


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _refuse_existing(out: Path, overwrite: bool, checkpoint: Path) -> None:
    if not out.exists():
        return
    if out.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise UserError(f"{out} holds the checkpoint itself: name another folder")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out} exists already: name another folder, or give --overwrite")
    if not is_public_folder(out):
        raise UserError(f"{out} is not an earlier export (no config.json of a moduleformer): it is not overwritten")


def _replace(part: Path, out: Path) -> None:
    """Put the finished folder in its place; an earlier export moves aside first and is removed last."""
    old = None
    if out.exists():
        old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(out, old)
    os.rename(part, out)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
