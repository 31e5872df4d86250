"""Export and import: bit-exact round trip, same logits in every loader, nothing destroyed by mistakes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import megamf.hf
from megamf.checkpoint import EXP_AVG, MASTER, Checkpoint, module_table, save
from megamf.errors import UserError
from megamf.evaluate import load_model
from megamf.hf.convert import export_hf, import_hf, max_logit_difference
from megamf.hf.portable.modeling_moduleformer import ModuleFormerForCausalLM


@pytest.fixture
def checkpoint(tmp_path, tiny, random_weights):
    """A training checkpoint as a bfloat16 run leaves it: weights, fp32 masters, a moment; experts one by one."""

    def make(dtype=torch.float32, name="run", losses=None, drop=None, **changes):
        config = tiny(**changes)
        master = random_weights(config)
        tensors = {}
        groups = {"weights": dtype, EXP_AVG: torch.float32}
        if dtype != torch.float32:
            groups[MASTER] = torch.float32
        for group, kept in groups.items():
            for key, value in master.items():
                if key == drop:
                    continue
                value = value.to(kept)
                parts = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
                tensors |= {f"{group}/{key}{suffix}": part for suffix, part in parts.items()}
        state = {"step": 7, "consumed_tokens": 1234, "config": {"losses": losses or {}, "train": {"seq_len": 16}}}
        modules = module_table(
            config.n_layer,
            config.n_att_experts_per_layer or config.n_att_experts,
            config.n_mlp_experts_per_layer or config.n_mlp_experts,
        )
        return save(tmp_path / name, 7, tensors, state, modules, config.model_dump(mode="json"), run_id="r"), master

    return make


def ids(batch=2, time=9):
    return torch.randint(41, (batch, time), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"gate_type": "gmm", "n_head": 1, "att_hidden": 16}, {"gate_type": "linear"}])
def test_import_then_export_is_bit_exact(public_folder, tmp_path, dtype, changes):
    folder = public_folder(dtype=dtype, **changes)
    step = import_hf(folder, tmp_path / "imported")
    report = export_hf(tmp_path / "imported", tmp_path / "exported")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "exported"))
    assert before.keys() == after.keys() and report.num_tensors == len(before)
    for name, value in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], value), name
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "exported"))
    assert {name: new[name] for name in old} == old
    with Checkpoint(step) as checkpoint:
        assert checkpoint.groups == ("weights",) and checkpoint.step == 0
        assert len(checkpoint.modules) == 2 * (4 + 5)


def test_every_loader_gives_the_same_logits(checkpoint, tmp_path):
    step, _ = checkpoint()
    out = tmp_path / "out"
    export_hf(step, out)
    model, _ = load_model(step, torch.float64)
    expected = model.logits(model(ids()).hidden_BTD)
    again, _ = load_model(out, torch.float64)
    assert torch.equal(again.logits(again(ids()).hidden_BTD), expected)
    for loader in (AutoModelForCausalLM, ModuleFormerForCausalLM):
        found = loader.from_pretrained(out, dtype=torch.float64)(ids()).logits
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)


UNEVEN = {"n_att_experts_per_layer": [2, 4], "n_mlp_experts_per_layer": [5, 3]}


WITHOUT_MEGAMF = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

found = {}
for name, work in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float64)
    x, mask = torch.tensor(work["input"]), torch.tensor(work["mask"])
    made = []
    for how in work["how"]:
        torch.manual_seed(5)
        made.append(model.generate(x, attention_mask=mask, **how).tolist())
    classes = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True, dtype=torch.float64)
    torch.nn.init.normal_(classes.score.weight)
    classes.save_pretrained(name + "-classes")
    labels = torch.tensor([1, 0])
    found[name] = {
        "logits": model(x).logits.tolist(), "made": made, "score": classes(x, attention_mask=mask).logits.tolist(),
        "loss": classes(x, attention_mask=mask, labels=labels).loss.item(),
    }
assert not any(name.split(".")[0] == "megamf" for name in sys.modules)
json.dump(found, open(sys.argv[2], "w"))
"""
WAYS = [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}, {"num_beams": 2, "do_sample": True}]


def test_exports_run_without_megamf_as_they_do_with_it(checkpoint, tmp_path):
    """Logits, generation with left padding in every way, with a cache and without, and the classification head."""
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    how = [{**common, **way, "use_cache": cached} for way in WAYS for cached in (True, False)]
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    work = {}
    for name, changes in (("even", {}), ("uneven", UNEVEN), ("shared", {"n_head": 1, "att_hidden": 16})):
        step, _ = checkpoint(name=f"run-{name}", **changes)
        export_hf(step, tmp_path / name)
        work[name] = {"input": ids().tolist(), "mask": mask.tolist(), "how": how}
    (tmp_path / "work.json").write_text(json.dumps(work))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_MEGAMF, "work.json", "found.json"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=400)
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        ours, _ = load_model(tmp_path / f"run-{name}", torch.float64)
        expected = ours.logits(ours(ids()).hidden_BTD)
        assert torch.allclose(torch.tensor(found["logits"], dtype=torch.float64), expected, rtol=1e-11, atol=1e-12)
        native = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        assert type(native) is megamf.hf.ModuleFormerForCausalLM
        for way, made in zip(how, found["made"]):
            torch.manual_seed(5)
            assert native.generate(ids(), attention_mask=mask, **way).tolist() == made, (name, way)
        assert all(made == again for made, again in zip(found["made"][::2], found["made"][1::2]))
        # Four ways, and no two of them say the same.
        assert len({str(made) for made in found["made"]}) >= 3
        classes = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{name}-classes", dtype=torch.float64)
        assert type(classes) is megamf.hf.ModuleFormerForSequenceClassification
        output = classes(ids(), attention_mask=mask, labels=torch.tensor([1, 0]))
        assert torch.allclose(output.logits, torch.tensor(found["score"], dtype=torch.float64), rtol=1e-9)
        assert output.loss.item() == pytest.approx(found["loss"], rel=1e-6)


def test_uneven_layers_survive_export_and_import(checkpoint, tmp_path):
    step, _ = checkpoint(**UNEVEN)
    out = tmp_path / "out"
    export_hf(step, out)
    tree = json.loads((out / "config.json").read_text())
    assert {name: tree[name] for name in UNEVEN} == UNEVEN and tree["n_mlp_experts"] == 5
    assert "2 to 4, 2 a token" in (out / "README.md").read_text()
    again = import_hf(out, tmp_path / "imported")
    with Checkpoint(step) as before, Checkpoint(again) as after:
        assert before.logical_shapes("weights") == after.logical_shapes("weights")
        assert len(after.modules) == 2 + 5 + 4 + 3
        for name in before.logical_shapes("weights"):
            assert torch.equal(before.full(name), after.full(name))
    ours, _ = load_model(step, torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    found = theirs(ids(), labels=ids())
    expected = ours.logits(ours(ids()).hidden_BTD)
    assert torch.allclose(found.logits, expected, rtol=1e-11, atol=1e-12) and found.loss.isfinite()
    del tree["n_mlp_experts_per_layer"]
    (out / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="mlpf"):
        import_hf(out, tmp_path / "again")


def test_shards_masks_and_dtype(checkpoint, tmp_path):
    step, master = checkpoint()
    out = tmp_path / "out"
    progress = []
    report = export_hf(
        step,
        out,
        dtype=torch.bfloat16,
        buffers=True,
        max_shard_bytes=6000,
        on_tensor=lambda *state: progress.append(state),
    )
    assert len(report.files) > 3 and all((out / file).is_file() for file in report.files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for file in report.files:
        values = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in values)
        found |= values
    masks = {name for name in found if name.endswith((".mask", ".cum_weight"))}
    assert len(masks) == 4 and found.keys() - masks == master.keys()
    assert index["metadata"]["total_size"] == sum(v.numel() * v.itemsize for v in found.values()) == report.total_bytes
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in master.items())
    assert found["transformer.h.1.attn.mask"].tolist() == torch.ones(13, 13).tril().tolist()
    assert found["transformer.h.1.attn.cum_weight"].dtype == torch.bfloat16
    assert progress[-1] == (report.total_bytes, report.total_bytes)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert ModuleFormerForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert load_model(out, torch.bfloat16)[0].lm_head.weight.equal(found["lm_head.weight"])


def test_masters_are_taken_where_they_say_more(checkpoint, tmp_path):
    step, master = checkpoint(torch.bfloat16)
    export_hf(step, tmp_path / "low")
    export_hf(step, tmp_path / "high", dtype=torch.float32)
    low, high = (load_file(tmp_path / name / "model.safetensors") for name in ("low", "high"))
    for name, value in master.items():
        assert torch.equal(low[name], value.bfloat16()) and torch.equal(high[name], value)


def test_what_is_written_besides(checkpoint, tmp_path):
    step, _ = checkpoint(losses={"balance": "switch", "balance_weight": 0.02})
    out = tmp_path / "my-model"
    export_hf(step, out)
    config = json.loads((out / "config.json").read_text())
    assert config["aux_loss_type"] == "switch" and config["aux_loss_weight"] == 0.02
    assert config["architectures"] == ["ModuleFormerForCausalLM"] and config["torch_dtype"] == "float32"
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# my-model" in card
    assert "7 steps, 1,234 tokens" in card
    assert "megamf" not in (out / "modeling_moduleformer.py").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.pad_token_id == 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_check(checkpoint, tmp_path, dtype):
    step, _ = checkpoint()
    export_hf(step, tmp_path / f"out-{dtype}", dtype=dtype)
    assert max_logit_difference(step, tmp_path / f"out-{dtype}") < 1e-4
    weights = load_file(tmp_path / f"out-{dtype}" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 0.5
    save_file(weights, str(tmp_path / f"out-{dtype}" / "model.safetensors"), metadata={"format": "pt"})
    assert max_logit_difference(step, tmp_path / f"out-{dtype}") > 1e-2


def test_existing_folders_are_safe(checkpoint, tmp_path):
    step, _ = checkpoint()
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for overwrite, message in ((False, "exists already"), (True, "not an earlier export")):
        with pytest.raises(UserError, match=message):
            export_hf(step, out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "precious"
    with pytest.raises(UserError, match="holds the checkpoint itself"):
        export_hf(step, tmp_path / "run", overwrite=True)
    export_hf(step, tmp_path / "new")
    (tmp_path / "new" / "stale").write_text("")
    with pytest.raises(UserError, match="exists already"):
        export_hf(step, tmp_path / "new")
    export_hf(step, tmp_path / "new", overwrite=True)
    assert not (tmp_path / "new" / "stale").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", "new"}


def test_a_failed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    step, _ = checkpoint(drop="transformer.h.1.ln_2.bias")
    with pytest.raises(UserError, match=r"transformer\.h\.1\.ln_2\.bias"):
        export_hf(step, tmp_path / "out")
    whole, _ = checkpoint(name="whole")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megamf.hf.convert.write_file", refuse)
    with pytest.raises(OSError, match="No space left"):
        export_hf(whole, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "whole"}


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.ln_f.bias"), "missing: transformer.ln_f.bias"),
        (lambda w: w.update({"transformer.h.7.x": torch.ones(1)}), r"of no use: transformer\.h\.7\.x"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(40, 16)}),
            r"\[40, 16\], its config.json describes \[41, 16\]",
        ),
    ],
)
def test_import_uses_every_tensor_exactly_once(public_folder, tmp_path, change, message):
    folder = public_folder()
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        import_hf(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_import_passes_over_masks_and_spares_what_is_there(public_folder, tmp_path):
    folder = public_folder()
    edit(folder, lambda w: w.update({"transformer.h.0.attn.mask": torch.ones(13, 13, dtype=torch.int8)}))
    import_hf(folder, tmp_path / "imported")
    with pytest.raises(UserError, match="already holds checkpoints"):
        import_hf(folder, tmp_path / "imported")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ('{"model_type": "gpt2"}', "'gpt2', expected 'moduleformer'"), ("[]", "'list'")],
)
def test_import_of_something_else(public_folder, tmp_path, text, message):
    folder = public_folder()
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        import_hf(folder, tmp_path / "imported")
