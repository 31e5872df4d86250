"""PEFT loads the exported adapters onto the exported base model and computes what the checkpoint does."""

import copy
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from megamf.adapt.fold import fold
from megamf.adapt.lora import attach
from megamf.adapt.peft_folder import export_adapters
from megamf.checkpoint import Checkpoint, module_table, save
from megamf.config import ModelConfig
from megamf.config.run import Tune
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.hf.convert import export_hf
from megamf.model import ModuleFormer, initialise
from megamf.model.tuning import logical_parts, specialise

SIZES = {"vocab_size": 61, "n_layer": 2, "n_embd": 16, "ffd_hidden": 20, "bos_token_id": None, "eos_token_id": 0}
SPARSE = {"n_att_experts": 4, "n_mlp_experts": 5, "gating_size": 8, "n_head": 2, "att_hidden": 12}
NEOX = {
    "kind": "gpt_neox", "n_head": 2, "att_hidden": 16, "parallel_residual": True, "rotary_fraction": 0.5,
    "rotary_base": 100.0,
}  # fmt: skip
TUNE = {"strategy": "lora", "lora_rank": 3, "lora_alpha": 5.0}


def write(root, tune: dict | None = None, changes: dict | None = None, **model):
    """A checkpoint with adapters that matter, and one of its base model; changes: of the tune section in its state."""
    config = ModelConfig(**SIZES | (model or SPARSE))
    base = ModuleFormer(config)
    initialise(base, config, 0)
    tuned = copy.deepcopy(base)
    section = Tune(**TUNE | (tune or {}))
    specialise(tuned, section, {})
    attach(tuned, section, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    dense = not config.sparse
    tree = {"kind": config.kind} | config.model_dump(mode="json", exclude_unset=dense)
    table = [] if dense else module_table(config.n_layer, config.n_att_experts, config.n_mlp_experts)
    for name, built in (("base", base), ("tuned", tuned)):
        parts, tensors = logical_parts(built), {}
        for parameter_name, value in built.named_parameters():
            key, value = parts[parameter_name].key, value.detach().clone()
            split = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
            tensors |= {f"weights/{key}{suffix}": part for suffix, part in split.items()}
        state = {"config": {"tune": section.model_dump() | (changes or {})}} if name == "tuned" else {}
        save(root / name, 3, tensors, state, table, tree, run_id="r")
    return root / "tuned"


def logits(model, **options):
    input_BT = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        output = model(input_BT, **options)
    return output.logits if hasattr(output, "logits") else model.logits(output.hidden_BTD)


@pytest.mark.parametrize(
    ("sizes", "chosen", "remote"),
    [(SPARSE, "all", False), (SPARSE, "all", True), (SPARSE, "mlp", True), (NEOX, "all", False)],
)
def test_logits_are_those_of_the_checkpoint(tmp_path, sizes, chosen, remote):
    tuned = write(tmp_path, {"lora_targets": chosen}, **sizes)
    export_hf(tmp_path / "base", tmp_path / "hf")
    folder = export_adapters(tuned, tmp_path / "adapter", base=str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, **({"trust_remote_code": True} if remote else {})
    ).eval()
    plain = logits(model)
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    expected = logits(load_model(tuned, torch.float64)[0])
    assert (plain - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-6, atol=1e-6)


def test_what_an_adapter_folder_cannot_hold(tmp_path):
    tuned = write(tmp_path / "a")
    with pytest.raises(UserError, match="has no adapters"):
        export_adapters(tmp_path / "a" / "base", tmp_path / "out")
    with pytest.raises(UserError, match=r"tune\.embeddings=true"):
        export_adapters(write(tmp_path / "b", {"embeddings": True}), tmp_path / "out")
    dense = write(tmp_path / "c", kind="dense", n_head=2, att_hidden=12)
    with pytest.raises(UserError, match="dense baseline"):
        export_adapters(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_adapters(tuned, tmp_path / "out")


@pytest.mark.parametrize("kind", ["moduleformer", "dense"])
def test_folded_is_what_is_read(tmp_path, kind):
    model = {"kind": "dense", "n_head": 2, "att_hidden": 12} if kind == "dense" else SPARSE
    tuned = write(tmp_path, **model)
    with Checkpoint(tuned) as source:
        fold(source, tmp_path / "plain")
    assert torch.equal(logits(load_model(tuned)[0]), logits(load_model(tmp_path / "plain")[0]))
    torch.testing.assert_close(
        logits(load_model(tuned, torch.float64)[0]).float(), logits(load_model(tmp_path / "plain")[0]),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, r"lora_rank=4.*differ"),
        ({"lora_targets": "mlp"}, r"lora_targets=mlp.*16 of 24 differ"),
        ({"strategy": "full", "lora_rank": 8, "lora_alpha": 16.0}, r"tune\.strategy=full"),
        ({"lora_rank": -1}, "does not say what they are"),
    ],
)
def test_adapters_that_do_not_fit_their_checkpoint(tmp_path, changes, message):
    tuned = write(tmp_path, changes=changes)
    with pytest.raises(UserError, match=message):
        load_model(tuned)
    with Checkpoint(tuned) as source, pytest.raises(UserError, match=message):
        fold(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((tuned / "step-00000003" / "state.json").read_text())["config"]["tune"]["lora_alpha"]
