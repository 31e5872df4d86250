"""Checkpoints of a run with expert parallelism, edited, exported and trained on in other layouts: to rounding.

Also what comes after an edit: a pruned model that is tuned on, with load concentration, and a second insertion.
"""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamf.checkpoint import Checkpoint, verify
from megamf.data.indexed import IndexedDataset
from megamf.evaluate.load import load_model
from megamf.modularity.places import Place
from megamf.modularity.statistics import collect

BASE, MORE, TUNED = 8, 2, 16
MODEL = {
    "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20,
    "n_att_experts": 4, "n_mlp_experts": 6, "k_att": 2, "k_mlp": 2, "gating_size": 32,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
LAYOUTS = {"ep2-zero1": (2, 1), "ep1-zero1": (1, 1), "ep2-zero3": (2, 3)}
RESUMED = {"pruned": ["ep2-zero1", "ep1-zero1"], "grown": ["ep2-zero1", "ep1-zero1"]}
CONCENTRATED = {"balance": "none", "concentration": 0.5}
ALONE = {"balance": "none"}


def config(root: Path, corpus: Path, name: str, steps: int, layout: str, model: dict, **sections) -> dict:
    ep, stage = LAYOUTS[layout]
    deepspeed = f"zero{stage}"
    if stage == 3:
        # The defaults would keep parameters of this size whole.
        tree = json.loads((resources.files("megamf.ds_configs") / "zero3.json").read_text())
        tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000}
        deepspeed = str(root / "zero3.json")
        Path(deepspeed).write_text(json.dumps(tree))
    return {
        "run": {"dir": str(root / name), "seed": 5},
        "model": model,
        "data": {"train": [{"path": str(corpus)}]},
        "losses": {"balance_weight": 0.02},
        "optim": {"lr": 1e-2, "min_lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
        "train": {
            "steps": steps, "seq_len": 24, "micro_batch": 2, "global_batch": 8,
            "precision": "bf16" if name.endswith("bf16") else "fp32",
        },
        "parallel": {"ep": ep},
        "logging": {"tensorboard": False, "module_load_every": 0},
        "deepspeed": deepspeed,
        **sections,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(corpus, launch, tmp_path_factory) -> Path:
    """A run with EP 2, its edits, and what was trained from them, all by one group of two processes."""
    root = tmp_path_factory.mktemp("surgery")
    pruned = MODEL | {"n_att_experts_per_layer": [4, 3], "n_mlp_experts_per_layer": [5, 6]}
    grown = MODEL | {"n_att_experts": 5, "n_mlp_experts": 8}
    twice = grown | {"n_att_experts": 6}
    models = {"base": MODEL, "noop": MODEL, "pruned": pruned, "imported": pruned, "grown": grown, "twice": twice}
    data, base = ["--data", str(corpus)], str(root / "base")

    def train(name: str, source: str, layout: str, steps: int, **sections) -> dict:
        return {"train": config(root, corpus, name, steps, layout, models[source], **sections)}

    def resumed(source: str, layout: str) -> dict:
        start = {"resume": str(root / source), "every": 0}
        return train(f"{source}-{layout}", source, layout, BASE + MORE, checkpoint=start)

    def tuned(name: str, source: str, layout: str, steps: int, **sections) -> dict:
        return train(name, source, layout, steps, checkpoint={"init_from": str(root / source), "every": 0}, **sections)

    rows = {"strategy": "router_rows"}
    work = [
        train("base", "base", "ep2-zero1", BASE, checkpoint={"every": 0}),
        {"edit": ["modules", "show", base, *data, "--json", str(root / "use.json")]},
        {"edit": ["modules", "prune", base, str(root / "noop"), "--tau", "0", "--statistics", str(root / "use.json")]},
        {"edit": ["modules", "prune", base, str(root / "pruned"), "--modules", "L01.attention.002", "L00.mlp.001"]},
        {
            "edit": [
                "modules", "insert", base, str(root / "grown"), "--attention", "1", "--mlp", "2", "--rows", "quiet",
                "--zero-output", *data,
            ]
        },
        {"edit": ["modules", "insert", str(root / "grown"), str(root / "twice"), "--attention", "1"]},
        {"edit": ["export_hf", str(root / "pruned"), str(root / "hf")]},
        {"edit": ["import_hf", str(root / "hf"), str(root / "imported")]},
        resumed("base", "ep2-zero1"),
        resumed("noop", "ep2-zero1"),
        *(resumed(source, layout) for source, layouts in RESUMED.items() for layout in layouts),
        tuned("from-pruned", "pruned", "ep1-zero1", MORE),
        tuned("from-imported", "imported", "ep1-zero1", MORE),
        tuned("from-pruned-zero3", "pruned", "ep2-zero3", MORE),
        tuned("from-pruned-bf16", "pruned", "ep2-zero3", 1),
        tuned("concentrated", "pruned", "ep1-zero1", TUNED, losses=CONCENTRATED),
        tuned("concentrated-ep2", "pruned", "ep2-zero1", MORE, losses=CONCENTRATED),
        tuned("alone", "pruned", "ep1-zero1", TUNED, losses=ALONE),
        tuned("latest", "twice", "ep1-zero1", 1, tune=rows),
        tuned("all", "twice", "ep1-zero1", 1, tune=rows | {"inserted": "all"}),
    ]  # fmt: skip
    launch("surgery_worker.py", 2, work, root / "log")
    return root


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}


def loaded_state(run: Path) -> dict[str, torch.Tensor]:
    """What all ranks together had before their first step."""
    found = {}
    for path in sorted(run.glob("resumed-*.safetensors")):
        share = {key: value for key, value in load_file(path).items() if not key.startswith("optimizer_step/")}
        assert not found.keys() & share.keys()
        found |= share
    return found


def logits(path: Path, corpus: Path) -> torch.Tensor:
    """In float32, of the first tokens of the corpus."""
    model, _ = load_model(path)
    with IndexedDataset(corpus) as dataset, torch.no_grad():
        ids = torch.from_numpy(dataset.tokens(0, 8 * 24).astype("int64")).view(8, 24)
        return model.logits(model(ids).hidden_BTD)


def test_pruning_nothing_is_bit_exact(runs, corpus):
    assert torch.equal(logits(runs / "noop", corpus), logits(runs / "base", corpus))
    assert losses(runs / "noop-ep2-zero1") == losses(runs / "base-ep2-zero1")
    with Checkpoint(runs / "noop") as noop, Checkpoint(runs / "base") as base:
        assert noop.manifest.tensors.keys() == base.manifest.tensors.keys() and noop.modules == base.modules


def test_an_insertion_without_effect_changes_no_output(runs, corpus):
    torch.testing.assert_close(logits(runs / "grown", corpus), logits(runs / "base", corpus), rtol=1e-5, atol=1e-5)


def test_export_and_import_are_bit_exact(runs, corpus):
    pruned = logits(runs / "pruned", corpus)
    assert torch.equal(logits(runs / "imported", corpus), pruned)
    assert torch.equal(logits(runs / "hf", corpus), pruned)
    assert losses(runs / "from-imported") == losses(runs / "from-pruned")


@pytest.mark.parametrize(
    ("source", "layout"), [(source, layout) for source, layouts in RESUMED.items() for layout in layouts]
)
def test_training_goes_on_from_an_edit_in_any_layout(runs, source, layout):
    """Every number is loaded as it was written, moments included, and the losses of the layouts agree."""
    run = runs / f"{source}-{layout}"
    with Checkpoint(runs / source) as edit:
        assert not verify(edit.path)
        found = loaded_state(run)
        assert found.keys() == edit.manifest.tensors.keys()
        for group in edit.groups:
            assert all(torch.equal(found[f"{group}/{name}"], edit.tensor(name, group)) for name in edit.names(group))
    assert losses(run).keys() == {BASE + 1, BASE + 2}
    assert losses(run) == pytest.approx(losses(runs / f"{source}-ep2-zero1"), abs=2e-5)


def test_the_first_loss_after_an_insertion_without_effect_is_that_of_before(runs):
    before, after = (losses(runs / f"{source}-ep2-zero1")[BASE + 1] for source in ("base", "grown"))
    assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("run", ["from-pruned", "from-pruned-zero3", "from-pruned-bf16"])
def test_a_new_run_takes_the_weights_and_no_moments(runs, run):
    found, low = loaded_state(runs / run), run.endswith("bf16")
    with Checkpoint(runs / "pruned") as source:
        for name in source.names():
            weights = source.tensor(name)
            assert torch.equal(found[f"weights/{name}"], weights.to(torch.bfloat16) if low else weights), name
            if low:
                assert torch.equal(found[f"master/{name}"], weights.to(torch.bfloat16).float()), name
            assert not found[f"exp_avg/{name}"].any() and not found[f"exp_avg_sq/{name}"].any(), name


def test_a_new_run_trains_alike_at_zero_3(runs):
    assert losses(runs / "from-pruned-zero3") == pytest.approx(losses(runs / "from-pruned"), abs=2e-5)


def entropy(run: Path, corpus: Path) -> float:
    """H(m) of the load, summed over routers."""
    model, _ = load_model(run)
    return sum(r.entropy for r in collect(model, corpus, seq_len=24, batch=8, max_batches=4).routers)


def test_a_pruned_model_is_tuned_on_and_its_load_concentrates(runs, corpus):
    for run in ("concentrated", "alone"):
        found = [losses(runs / run)[step] for step in range(1, TUNED + 1)]
        assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.05, f"{run}: {found}"
        with Checkpoint(runs / run) as tuned:
            assert tuned.model["n_mlp_experts_per_layer"] == [5, 6] and tuned.step == TUNED
    first = {step: loss for step, loss in losses(runs / "concentrated").items() if step <= MORE}
    assert losses(runs / "concentrated-ep2") == pytest.approx(first, abs=2e-5)
    before, alone, concentrated = (entropy(runs / run, corpus) for run in ("pruned", "alone", "concentrated"))
    assert concentrated < min(before, alone) - 0.2, (before, alone, concentrated)


@pytest.mark.parametrize(("run", "attention", "mlp"), [("latest", {5}, set()), ("all", {4, 5}, {6, 7})])
def test_of_two_insertions_the_last_is_trained_or_all(runs, run, attention, mlp):
    wanted = {
        f"{key}.{index}"
        for layer in range(2)
        for kind, indices in (("attention", attention), ("mlp", mlp))
        for key in Place(layer, kind).expert_keys()
        for index in indices
    }
    with Checkpoint(runs / run) as after, Checkpoint(runs / "twice") as before:
        expert_names = [name for name in after.names() if "experts.weight" in name]
        moved = {name for name in expert_names if not torch.equal(after.tensor(name), before.tensor(name))}
        assert set(after.names("exp_avg")) & set(expert_names) == wanted
        assert moved <= wanted and len(moved) > len(wanted) / 2
        assert {row.generation for row in after.modules} == {0, 1, 2}
        assert {row.provenance for row in after.modules if row.generation} == {"inserted"}
