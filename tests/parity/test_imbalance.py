"""Uneven routing, batches and ranks change nothing but the time: every layout agrees with one process, and finishes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from imbalance_cases import MODEL, SCENARIOS, STEPS, B, T, make_model

from megamf.checkpoint import Checkpoint, module_table, save
from megamf.config import ModelConfig, to_tree, validate

STAGES = (0, 1, 2)
ALONE = "ep1-zero0"


def tree(ep: int, stage: int, world: int, strategy: str = "auto", **changes: Any) -> dict[str, Any]:
    """A layout of `world` ranks. A large epsilon keeps AdamW from dividing rounding errors by each other."""
    train = {"steps": STEPS, "seq_len": T, "micro_batch": B // world, "global_batch": B}
    return {
        "model": MODEL | changes.pop("model", {}),
        "losses": {"balance": "mi", "balance_weight": 0.05, "z_weight": 0.01, **changes.pop("losses", {})},
        "optim": {"lr": 1e-2, "eps": 1e-3, "warmup_steps": 0, "schedule": "constant", "clip": 0.1},
        "train": train | changes.pop("train", {}),
        "parallel": {"ep": ep} | ({"attention_experts": strategy} if ep > 1 else {}),
        "deepspeed": f"zero{stage}",
    }


def layouts(world: int, degrees: tuple[int, ...], stages: tuple[int, ...] = STAGES) -> dict[str, dict[str, Any]]:
    found = {}
    for stage in stages:
        for ep in degrees:
            for short, strategy in (("tokens", "move_tokens"), ("weights", "gather_weights")):
                name = f"ep{ep}-zero{stage}" + (f"-{short}" if ep > 1 else "")
                found[name] = tree(ep, stage, world, strategy)
    return found


FOUR, TWO = layouts(4, (1, 2, 4)) | layouts(4, (2,), (3,)), layouts(2, (2,))


def counting(strategy: str, layers: int, accumulation: int, scope: str) -> dict[str, Any]:
    train = {"micro_batch": 1, "global_batch": 4 * accumulation}
    return tree(2, 1, 4, strategy, train=train, losses={"scope": scope}, model={"n_layer": layers, "k_att": 2})


COUNTED = {
    f"{strategy} {layers} {accumulation} {scope}": counting(strategy, layers, accumulation, scope)
    for strategy, layers, accumulation, scope in (
        ("move_tokens", 1, 1, "global_batch"),
        ("move_tokens", 3, 1, "global_batch"),
        ("move_tokens", 3, 2, "global_batch"),
        ("move_tokens", 1, 2, "micro_batch"),
        ("gather_weights", 1, 1, "global_batch"),
        ("gather_weights", 3, 2, "global_batch"),
    )
}
TOKENS = {"none on any rank": [0], "one on one rank": [0, 1], "none on some": [5, 0, 0, 3], "some everywhere": [4, 7]}


@pytest.fixture(scope="module")
def results(launch, tmp_path_factory) -> Path:
    """Every layout through every scenario, in one process group of four ranks, one of two, and one process."""
    out = tmp_path_factory.mktemp("imbalance")
    starts = {scenario: str(write_start(out / "starts" / scenario, scenario)) for scenario in SCENARIOS}
    launch("imbalance_worker.py", 1, {"starts": starts, "layouts": {ALONE: tree(1, 0, 1)}}, out / "1")
    launch("imbalance_worker.py", 2, {"starts": starts, "layouts": TWO, "dispatch": TOKENS}, out / "2")
    work = {"starts": starts, "layouts": FOUR, "collectives": COUNTED, "dispatch": TOKENS}
    launch("imbalance_worker.py", 4, work, out / "4")
    return out


def write_start(root: Path, scenario: str) -> Path:
    """A checkpoint to start from: weights, and moments of zero."""
    config = ModelConfig(**MODEL)
    tensors = {}
    for key, value in make_model(config, scenario, seed=11).state_dict().items():
        parts = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
        for suffix, part in parts.items():
            tensors[f"weights/{key}{suffix}"] = part
            tensors |= {f"{moment}/{key}{suffix}": torch.zeros_like(part) for moment in ("exp_avg", "exp_avg_sq")}
    modules = module_table(config.n_layer, config.n_att_experts, config.n_mlp_experts)
    return save(root, 0, tensors, {}, modules, to_tree(validate({"model": MODEL}))["model"], run_id="start")


def seen(results: Path, world: int) -> dict[str, Any]:
    return json.loads((results / str(world) / "seen.json").read_text())


def tensors(results: Path, world: int, layout: str, scenario: str) -> dict[str, torch.Tensor]:
    path = results / str(world) / layout / scenario / "checkpoints" / f"step-{STEPS:08d}"
    with Checkpoint(path) as checkpoint:
        return {
            f"{group}/{name}": checkpoint.tensor(name, group).double()
            for group in ("weights", "exp_avg", "exp_avg_sq")
            for name in checkpoint.names(group)
        }


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("world", "layout"), [*((4, name) for name in FOUR), *((2, name) for name in TWO)])
def test_layout_agrees_with_one_process(results, world, layout, scenario):
    wanted, found = seen(results, 1)["layouts"][ALONE][scenario], seen(results, world)["layouts"][layout][scenario]
    assert found["skipped"] == [None] * STEPS
    for key in ("loss", "aux_loss", "grad_norm"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-5), key
    assert min(wanted["grad_norm"]) > 0.1, "clipping must bite"
    alone, together = tensors(results, 1, ALONE, scenario), tensors(results, world, layout, scenario)
    assert alone.keys() == together.keys()
    # Sums of terms that cancel are zero but for rounding: their error is measured by the whole group.
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        names = [name for name in alone if name.startswith(f"{group}/")]
        whole = torch.stack([alone[name].norm() for name in names]).norm()
        for name in names:
            error = (together[name] - alone[name]).norm()
            assert error <= 1e-5 * alone[name].norm() + 1e-7 * whole, f"{name}: {error / alone[name].norm():.1e}"


def test_the_scenarios_are_what_they_say(results):
    found = seen(results, 4)["layouts"]["ep4-zero1-tokens"]
    # One dispatcher for both kinds of experts: two rows a token of all ranks is the MLP's share.
    assert found["all_tokens_on_one_expert"]["peak_rows"] == [2 * B * T, 0, 0, 0]
    assert all(0 < rows < 2 * B * T for rows in found["uneven_documents"]["peak_rows"])
    end = tensors(results, 4, "ep2-zero1-tokens", "an_expert_without_tokens")
    for experts, dead in (("attn.q_proj", 2), ("mlpf", 5)):
        name = f"exp_avg/transformer.h.0.{experts}.experts.weight"
        assert not end[f"{name}.{dead}"].any() and end[f"{name}.{dead - 1}"].any()


def test_the_hottest_rank_is_reported(results):
    for case in seen(results, 4)["layouts"]["ep4-zero1-tokens"].values():
        assert case["hottest"]["hottest_rank_rows"] == max(case["peak_rows"])
        assert 1e8 < case["hottest"]["hottest_rank_memory"] < 1e10, "a process with torch takes some 300 MB"
        assert case["left"] == 0, "rows are counted anew"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("tokens", TOKENS)
def test_dispatchers_with_no_tokens(results, world, tokens):
    errors = seen(results, world)["dispatch"][tokens]
    assert set(errors) == {"tokens", "weights", "weights kept"}
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("name", COUNTED)
def test_collectives_of_a_step(results, name):
    """Balance losses: one all-reduce a step, whatever the layers. Split sizes: one exchange a routing decision."""
    strategy, layers, accumulation, scope = name.split()
    layers, accumulation = int(layers), int(accumulation)
    looks_ahead = accumulation if scope == "global_batch" and accumulation > 1 else 0
    forwards, backwards = accumulation + looks_ahead, accumulation
    # Counts of labels, router sums, and what is known of the update.
    expected = {"all_reduce": 1 + (accumulation if scope == "micro_batch" else 1) + 1}
    # An MLP layer: split sizes, there, back. An attention layer: split sizes, and for either projection there and back.
    attention = strategy == "move_tokens"
    sizes, rows = (2, 2 + 4) if attention else (1, 2)
    expected["all_to_all_single"] = layers * (forwards * (sizes + rows) + backwards * rows)
    if not attention:
        expected["all_gather_into_tensor"] = layers * 2 * (forwards + backwards)
        expected["reduce_scatter_tensor"] = layers * 2 * backwards
    assert seen(results, 4)["collectives"][name] == expected
