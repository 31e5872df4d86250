"""Sequences split over ranks train as whole ones: gradients, norm, one update, losses, evaluation, resuming."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megamf.checkpoint import Checkpoint, verify

STEPS = 10
# (context, ep, ZeRO stage): four ranks, then two.
FOUR = [(context, ep, stage) for context in (2, 4) for ep in (1, 2) for stage in (0, 1, 2, 3)]
TWO = [(2, 1, 1), (2, 2, 0), (2, 2, 2)]
# K is not V; K = V; no experts. Documents of 1 to 60 tokens in rows of 32: chunks of 4 tokens cut nearly all of them.
MODELS = {
    "projected": {"n_head": 2, "att_hidden": 12},
    "shared": {"n_head": 1, "att_hidden": 16},
    "dense": {"kind": "dense", "n_head": 2, "att_hidden": 12},
}


def config(
    corpus: Path,
    model: str,
    layout: tuple[int, int, int],
    micro_batch: int,
    train: dict | None = None,
    directory: Path | None = None,
    strategy: str = "auto",
    mask: bool = True,
) -> dict:
    context, ep, stage = layout
    tree = {
        "run": {"seed": 3},
        "model": {
            "vocab_size": 61, "n_layer": 2, "n_embd": 16, "ffd_hidden": 20, "bos_token_id": None, "eos_token_id": 0,
            **MODELS[model],
        },
        "data": {"train": [{"path": str(corpus)}], "valid_fraction": 0.1, "document_mask": mask},
        "losses": {"balance": "none"},
        # The first update is the sign of the gradient but for eps: 1e-8 would make rounding errors of tiny ones large.
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 3, "clip": 0.5, "eps": 1e-5},
        "train": {
            "steps": STEPS, "seq_len": 32, "micro_batch": micro_batch, "global_batch": 8, "eval_every": 5,
            "eval_batches": 2, **(train or {}),
        },
        "parallel": {"context": context, "ep": ep, "attention_experts": strategy},
        "checkpoint": {"every": 4, "keep": 0},
        "logging": {"tensorboard": False},
        "deepspeed": f"zero{stage}",
    }  # fmt: skip
    if model != "dense":
        tree["model"] |= {"n_att_experts": 4, "n_mlp_experts": 8, "k_att": 2, "k_mlp": 3, "gating_size": 8}
        tree["losses"] = {"balance": "mi", "balance_weight": 0.05, "z_weight": 0.01}
    if directory is not None:
        tree["run"]["dir"] = str(directory)
    return tree


def name_of(layout: tuple[int, int, int]) -> str:
    return "context{}-ep{}-zero{}".format(*layout)


@pytest.fixture(scope="module")
def results(corpus, launch, tmp_path_factory) -> Path:
    """What process groups of 4, 2 and 1 ranks saw; the last goes on from a checkpoint of the first."""
    out = tmp_path_factory.mktemp("context")

    def case(*arguments, steps: int = STEPS, **options) -> dict:
        return {"steps": steps, "config": config(corpus, *arguments, **options)}

    def job(name: str, layout: tuple[int, int, int], micro_batch: int, source: str | None = None) -> dict:
        tree = config(corpus, "shared", layout, micro_batch, directory=out / name)
        copy = [str(out / source / "checkpoints" / "step-00000004"), str(out / name)] if source else None
        return {"config": tree, "copy": copy}

    # Stages 0 and 2 differ from their neighbours within a step: three of these are enough.
    four = {
        name_of(layout): case("projected", layout, 2 * layout[0], steps=STEPS if layout[2] in (1, 3) else 3)
        for layout in FOUR
    }
    four |= {
        "shared": case("shared", (4, 2, 1), 8),
        "accumulated": case("shared", (2, 2, 2), 1, strategy="gather_weights"),
        "recomputed": case("shared", (2, 4, 1), 4, train={"activation_checkpointing": "full"}, strategy="move_tokens"),
        "dense": case("dense", (4, 1, 1), 8, steps=2, mask=False),
        "bf16": case("shared", (4, 2, 2), 8, train={"precision": "bf16"}),
    }
    two = {name_of(layout): case("projected", layout, 4) for layout in TWO}
    whole = (1, 1, 1)
    one = {
        "projected": case("projected", whole, 8),
        "shared": case("shared", whole, 8),
        "dense": case("dense", whole, 8, steps=2, mask=False),
        "bf16": case("shared", whole, 8, train={"precision": "bf16"}),
    }
    split_runs = [job("split", (2, 2, 1), 2), job("split-again", (2, 2, 1), 2, "split")]
    whole_runs = [job("whole", whole, 4), job("joined", whole, 4, "split")]
    launch("context_worker.py", 4, {"cases": four, "jobs": split_runs}, out / "four")
    launch("context_worker.py", 2, {"cases": two, "jobs": []}, out / "two")
    launch("context_worker.py", 1, {"cases": one, "jobs": whole_runs}, out / "one")
    return out


CASES = [
    *[("four", name_of(layout), "projected") for layout in FOUR],
    *[("two", name_of(layout), "projected") for layout in TWO],
    ("four", "shared", "shared"),
    ("four", "accumulated", "shared"),
    ("four", "recomputed", "shared"),
    ("four", "dense", "dense"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name", "whole"), CASES)
def test_split_sequences_train_as_whole_ones(results, group, name, whole):
    """After one update: relative error 1e-5 of every gradient, weight and moment, and of the gradient norm."""
    wanted, found = (
        load_file(results / "one" / f"{whole}.safetensors"),
        load_file(results / group / f"{name}.safetensors"),
    )
    assert found.keys() >= {key for key in wanted if not key.startswith("master/")}
    assert any(key.startswith("gradients/") for key in wanted) and any(key.startswith("exp_avg_sq/") for key in wanted)
    for key in found.keys() & wanted.keys():
        error = (found[key].double() - wanted[key].double()).norm() / wanted[key].double().norm()
        assert error < 1e-5, f"{key}: relative error {error:.2e}"
    wanted, found = (
        json.loads(path.read_text()) for path in (results / "one" / f"{whole}.json", results / group / f"{name}.json")
    )
    assert found["grad_norm"][0] == pytest.approx(wanted["grad_norm"][0], rel=1e-5)
    assert found["tokens"] == wanted["tokens"][: len(found["tokens"])], "every token counts once"
    for key in ("loss", "aux_loss"):
        np.testing.assert_allclose(found[key], wanted[key][: len(found[key])], atol=1e-4, rtol=0, err_msg=key)
    if len(found["loss"]) == STEPS:
        assert wanted["loss"][-1] < wanted["loss"][0] - 0.2, "nothing was learnt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "context", "passes", "width"),
    [
        ("context4-ep2-zero1", 4, 2, 24),
        ("shared", 4, 2, 16),
        ("recomputed", 2, 2, 16),
        ("accumulated", 2, 3, 16),
        ("bf16", 4, 2, 8),
    ],
)
def test_bytes_on_the_way(results, name, context, passes, width):
    """(P-1)/P of B*S*X values a layer: keys for the forward and the backward pass (and the pass ahead of an
    accumulated step), gradients once, of four bytes. `width` is X, 2 * 12 where K is not V, in units of four bytes."""
    keys, gradients = json.loads((results / "four" / f"{name}.json").read_text())["context_bytes"]
    tokens = 8 * 32 // (4 // context)
    values = STEPS * 2 * tokens * (context - 1) // context
    assert keys == values * 4 * width * passes
    assert gradients == values * 4 * (16 if name == "bf16" else width)


@pytest.mark.slow
def test_low_precision(results):
    one, split = (json.loads((results / group / "bf16.json").read_text()) for group in ("one", "four"))
    np.testing.assert_allclose(split["loss"], one["loss"], atol=3e-2)
    np.testing.assert_allclose(split["grad_norm"], one["grad_norm"], rtol=5e-2)


def lines(run: Path, key: str) -> dict[int, float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in found if key in line}


@pytest.mark.slow
def test_whole_runs_and_their_evaluations_agree(results):
    """`joined` resumes, on one rank and whole sequences, what `split` saved with sequences split over two of four."""
    for key in ("loss", "tokens", "valid_loss", "valid_perplexity", "mlp_entropy"):
        whole = lines(results / "whole", key)
        assert whole
        for run in ("split", "split-again", "joined"):
            found = lines(results / run, key)
            resumed = run != "split"
            assert found.keys() == {step for step in whole if step > 4 or not resumed}, (run, key)
            assert found == pytest.approx({step: whole[step] for step in found}, rel=1e-4), (run, key)
    split, again = (lines(results / run, "loss") for run in ("split", "split-again"))
    assert again == {step: split[step] for step in again}, "the same topology resumes bit for bit"


@pytest.mark.slow
def test_checkpoints_do_not_know_the_split(results):
    final = f"checkpoints/step-{STEPS:08d}"
    for run in ("split", "joined"):
        assert verify(results / run / final) == []
        with Checkpoint(results / "whole" / final) as one, Checkpoint(results / run / final) as other:
            assert other.state["layout"]["context"] == (2 if run == "split" else 1)
            assert one.state["consumed_tokens"] == other.state["consumed_tokens"]
            for group in one.groups:
                assert one.names(group) == other.names(group)
                for name in one.names(group):
                    wanted, got = one.tensor(name, group).double(), other.tensor(name, group).double()
                    assert (got - wanted).norm() <= 1e-2 * wanted.norm() + 1e-12, f"{run}: {group}/{name}"
