"""A run goes on in any other layout: every weight and moment is the same one after resuming, and so are the losses."""

import json
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megamf.checkpoint import Checkpoint

# From the first layout to the last, two steps in each: every change of world size, ep and ZeRO stage is in it.
CHAIN = ["w4-ep4-zero3", "w2-ep1-zero1", "w2-ep2-zero0", "w3-ep3-zero3", "w1-ep1-zero0"]
LOW = ["w4-ep2-zero3-bf16", "w2-ep1-zero1-bf16", "w2-ep2-zero3-bf16"]
MICRO_BATCH = {4: 3, 3: 2, 2: 3, 1: 6}
TOTAL = 2 * len(CHAIN)


class Layout(NamedTuple):
    world: int
    ep: int
    stage: int
    precision: str

    @classmethod
    def of(cls, name: str) -> "Layout":
        world, ep, stage, *low = name.split("-")
        return cls(int(world[1:]), int(ep[2:]), int(stage[4:]), "bf16" if low else "fp32")


def job(root: Path, corpus: Path, name: str, source: str | None, steps: int, *, stands_for: str | None = None) -> dict:
    """`name` trains to `steps`, from the newest checkpoint of `source`."""
    layout = Layout.of(stands_for or name)
    deepspeed = f"zero{layout.stage}"
    if layout.stage == 3:
        # The defaults would keep parameters of this size whole.
        tree = json.loads((resources.files("megamf.ds_configs") / "zero3.json").read_text())
        tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000}
        deepspeed = str(root / "zero3.json")
        Path(deepspeed).write_text(json.dumps(tree))
    return {
        "config": {
            "run": {"dir": str(root / name), "seed": 5},
            "model": {
                "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20,
                "n_att_experts": 12, "n_mlp_experts": 12, "k_att": 2, "k_mlp": 3, "gating_size": 8,
                "bos_token_id": None, "eos_token_id": 0,
            },
            "data": {"train": [{"path": str(corpus)}]},
            "losses": {"balance_weight": 0.02},
            "optim": {"lr": 1e-2, "min_lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
            "train": {
                "steps": steps, "seq_len": 24, "micro_batch": MICRO_BATCH[layout.world], "global_batch": 12,
                "precision": layout.precision, "activation_checkpointing": "full" if layout.stage == 3 else "none",
            },
            "parallel": {"ep": layout.ep},
            "checkpoint": {"every": 0, "keep": 0, "resume": str(root / source) if source else "auto"},
            "logging": {"tensorboard": False},
            "deepspeed": deepspeed,
        }
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(corpus, launch, tmp_path_factory) -> Path:
    """The two chains, each process group running the jobs of its size; and one run that nothing disturbed."""
    root = tmp_path_factory.mktemp("elastic")
    jobs: dict[int, list[dict]] = {}
    for chain in (CHAIN, LOW):
        for place, name in enumerate(chain):
            source = chain[place - 1] if place else None
            jobs.setdefault(Layout.of(name).world, []).append(job(root, corpus, name, source, 2 * place + 2))
    jobs[1].append(job(root, corpus, "through", None, TOTAL, stands_for="w1-ep1-zero1"))
    for world in (4, 2, 3, 1):
        launch("elastic_worker.py", world, jobs[world], root / f"world-{world}")
    return root


def last_step(run: Path) -> Checkpoint:
    return Checkpoint(sorted((run / "checkpoints").glob("step-*"))[-1])


@pytest.mark.parametrize(("source", "name"), [*pairwise(CHAIN), *pairwise(LOW)])
def test_resuming_changes_no_number(runs, source, name):
    found, steps = {}, set()
    for path in sorted((runs / name).glob("resumed-*.safetensors")):
        for key, tensor in load_file(path).items():
            if key.startswith("optimizer_step/"):
                steps.add(tensor.item())
            else:
                assert key not in found, f"{key} is written by two ranks"
                found[key] = tensor
    with last_step(runs / source) as checkpoint:
        assert steps == {checkpoint.state["optimizer_step"]}
        wanted = {f"{group}/{key}" for group in checkpoint.groups for key in checkpoint.names(group)}
        assert found.keys() == wanted
        for key in wanted:
            group, tensor_name = key.split("/", 1)
            assert torch.equal(found[key], checkpoint.tensor(tensor_name, group)), key
        for kind in ("attn.q_proj", "mlpf"):
            for part in ("experts", "output_experts"):
                for moment in ("exp_avg", "exp_avg_sq"):
                    names = [f"{moment}/transformer.h.1.{kind}.{part}.weight.{expert}" for expert in range(12)]
                    assert any(found[name].abs().sum() > 0 for name in names), f"{names[0]}: nothing to lose"


def test_the_chain_ends_where_an_undisturbed_run_does(runs):
    def losses(run: Path) -> dict[int, float]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}

    through = losses(runs / "through")
    for place, name in enumerate(CHAIN):
        found = losses(runs / name)
        assert sorted(found) == [2 * place + 1, 2 * place + 2]
        for step, loss in found.items():
            assert loss == pytest.approx(through[step], abs=2e-5), f"{name}, step {step}"
    assert through[TOTAL] < through[1] - 0.1, "nothing was learnt: the comparison would prove little"
    with last_step(runs / "through") as one, last_step(runs / CHAIN[-1]) as other:
        assert one.state["optimizer_step"] == other.state["optimizer_step"] == TOTAL
        assert one.groups == other.groups
        for group in one.groups:
            for name in one.names(group):
                wanted, got = one.tensor(name, group).double(), other.tensor(name, group).double()
                assert (got - wanted).norm() <= 1e-2 * wanted.norm() + 1e-12, f"{group}/{name}"
