"""Folders of adapted models: PEFT reads the merged LoRA, everything comes back, and what does not fit is refused."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megamf.adapt.adamix import AdamixConfig, head_names, pairs_of, prepare, route
from megamf.adapt.folders import check_out, fingerprint, load_adapted, read_record, save
from megamf.adapt.loading import load_base, load_tokenizer
from megamf.adapt.tasks import Task
from megamf.errors import UserError

IDS = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
LABELS = ["c0", "c1", "c2"]


@pytest.fixture
def base(tiny_models):
    """base(name, kind) -> the model as `megamf adamix` loads it."""

    def load(name, kind, dtype=torch.float32):
        task = Task(kind, load_tokenizer(tiny_models / name), 24, labels=LABELS if kind == "classification" else [])
        return load_base(tiny_models / name, task, dtype)

    return load


@pytest.fixture
def saved(base, tmp_path):
    """saved(name, kind, **settings) -> folder, logits of the average, logits of copy 1; all copies are random."""

    def make(name, kind, **settings):
        model = base(name, kind)
        record = {
            "base": {"name": name, "model_type": name, "fingerprint": fingerprint(model, head_names(model, kind))},
            "labels": LABELS,
        }
        config = AdamixConfig(modules=2, rank=2, **settings)
        model = prepare(model, config, kind)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        route(pairs_of(model), "merged")
        merged = logits(model)
        route(pairs_of(model), "fixed", index=1)
        fixed = logits(model)
        save(tmp_path / "out", model, config, kind, record)
        assert torch.equal(logits(model), fixed)
        return tmp_path / "out", merged, fixed

    return make


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


MLP = ("mlpf.experts.weight", "mlpf.output_experts.weight")


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("bert", "classification", {}),
        ("bert", "regression", {"share": "none", "targets": ("query", "dense")}),
        ("llama", "generation", {"share": "down"}),
        ("llama", "classification", {}),
        ("molm", "generation", {}),
        ("molm", "classification", {"target_parameters": MLP, "targets": ("k_proj",), "share": "none"}),
    ],
    ids=str,
)
def test_peft_loads_the_merged_lora_unchanged(saved, base, tiny_models, name, kind, settings):
    folder, merged, fixed = saved(name, kind, **settings)
    if kind == "generation":
        plain = AutoModelForCausalLM.from_pretrained(tiny_models / name)
    else:
        number = 3 if kind == "classification" else 1
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_models / name, num_labels=number)
    loaded = peft.PeftModel.from_pretrained(plain, folder)
    assert torch.allclose(logits(loaded), merged, atol=1e-5) and not torch.allclose(merged, fixed, atol=1e-3)
    assert torch.allclose(logits(loaded.merge_and_unload()), merged, atol=1e-4)

    copies = load_adapted(base(name, kind), folder)
    assert torch.equal(logits(copies), merged)
    route(pairs_of(copies), "fixed", index=1)
    assert torch.equal(logits(copies), fixed)
    assert torch.allclose(logits(load_adapted(base(name, kind), folder, merged=True)), merged, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "classification"), ("llama", "generation"), ("molm", "generation")]
)
def test_adapters_come_back(saved, base, name, kind):
    folder, merged, fixed = saved(name, kind, method="adapter")
    assert not (folder / "adapter_config.json").exists()
    copies = load_adapted(base(name, kind), folder)
    assert torch.equal(logits(copies), merged)
    route(pairs_of(copies), "fixed", index=1)
    assert torch.equal(logits(copies), fixed)
    (folder / "copies.safetensors").unlink()
    single = load_adapted(base(name, kind), folder, merged=True)
    assert torch.allclose(logits(single), merged, atol=1e-5) and not pairs_of(single)


def test_the_fingerprint_knows_the_weights_and_not_the_precision_or_the_head(base):
    prints = {
        fingerprint(base("bert", "classification", dtype), ["classifier"]) for dtype in (torch.float32, torch.float64)
    }
    assert len(prints) == 1
    model = base("bert", "classification")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 0.5
    assert fingerprint(model, ["classifier"]) not in prints


def test_adapters_of_another_model_are_refused(saved, base, tmp_path):
    folder, _, _ = saved("bert", "classification")
    with pytest.raises(UserError, match=r"belong to bert.*llama"):
        load_adapted(base("llama", "classification"), folder)
    changed = base("bert", "classification")
    with torch.no_grad():
        changed.bert.embeddings.word_embeddings.weight[0, 0] += 1
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="weights differ"):
        load_adapted(changed, folder)
    assert before == sorted(path.name for path in folder.iterdir())


def test_damaged_folders(saved, base, tmp_path):
    folder, _, _ = saved("bert", "classification")
    tensors = load_file(folder / "copies.safetensors")
    name = next(name for name in tensors if "lora_A" in name)

    def refused(words):
        with pytest.raises(UserError, match=words):
            load_adapted(base("bert", "classification"), folder)

    save_file(tensors | {name: tensors[name][:1].contiguous()}, folder / "copies.safetensors")
    refused(r"1 tensors.*\(1, 16\) in the file, \(2, 16\) expected")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "copies.safetensors")
    refused("missing")
    (folder / "copies.safetensors").write_bytes(b"\x00" * 40)
    refused("cannot be read")
    record = json.loads((folder / "adamix.json").read_text())
    (folder / "adamix.json").write_text(json.dumps(record | {"adamix": record["adamix"] | {"modules": 0}}))
    refused("modules=0")
    (folder / "adamix.json").write_text("{")
    refused("cannot be read")
    shutil.rmtree(folder)
    refused("not written by")


def test_full_fine_tuning_is_an_ordinary_folder(base, tmp_path):
    model = base("llama", "generation")
    out = tmp_path / "full"
    out.mkdir()
    check_out(out)
    save(
        out,
        model,
        AdamixConfig("full", modules=1),
        "generation",
        {"base": {"fingerprint": ""}, "labels": [], "x": float("nan")},
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
    assert json.loads((out / "adamix.json").read_text())["x"] is None
    with pytest.raises(UserError, match="give it as MODEL"):
        read_record(out)
    with pytest.raises(UserError, match="exists already"):
        check_out(out)
    with pytest.raises(UserError, match="folder of"):
        check_out(tmp_path / "no" / "out")


def test_nothing_is_left_of_a_folder_that_could_not_be_written(base, tmp_path):
    model = prepare(base("bert", "classification"), AdamixConfig(modules=2), "classification")
    with pytest.raises(TypeError):
        save(tmp_path / "out", model, AdamixConfig(modules=2), "classification", {"bad": object()})
    assert list(tmp_path.glob("*")) == [] and list(tmp_path.glob(".*")) == []
