"""Every layout trains the same: gradients, norms and losses of EP x ZeRO against one process and a float64 oracle."""

import json
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megamf.config import RunConfig, validate
from megamf.data.loader import StepLoader, open_train
from megamf.model import ModuleFormer, initialise

STEPS, SHORT = 20, 4
STRATEGIES = {"tokens": "move_tokens", "weights": "gather_weights"}
LAYOUTS = [(ep, stage) for ep in (1, 2, 4) for stage in (0, 1, 2, 3)]
GMM = {"model": {"gate_type": "gmm"}, "routing_regularisation": 0.01}
UNEVEN = {
    "model": {
        "n_att_experts": 5, "n_att_experts_per_layer": [5, 4], "n_mlp_experts": 7, "n_mlp_experts_per_layer": [6, 7],
    }
}  # fmt: skip
UNEVEN_LAYOUTS = [(1, 1), (2, 0), (2, 1), (2, 3), (4, 1), (4, 2), (4, 3)]
# Every parameter in pieces, gathered for each use and let go at once: defaults would keep this model whole.
EAGER = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 2000}


def case(
    prefix: Path,
    *,
    ep: int,
    stage: int,
    micro_batch: int,
    steps: int = STEPS,
    travels: str = "tokens",
    recompute: str = "none",
    offload: bool = False,
    train: dict | None = None,
    model: dict | None = None,
    **losses,
) -> dict:
    """A tiny model with uneven documents, clipping that bites, and every loss turned on."""
    parallel = {"ep": ep} | ({"attention_experts": STRATEGIES[travels]} if ep > 1 else {})
    zero = {"stage": stage, "reduce_bucket_size": 3000}
    if stage == 3:
        zero |= EAGER
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    packaged = resources.files("megamf.ds_configs") / f"zero{stage}.json"
    deepspeed = prefix.with_name(f"zero{stage}{'_offload' * offload}.json")
    deepspeed.write_text(json.dumps(json.loads(packaged.read_text()) | {"zero_optimization": zero}))
    return {
        "steps": steps,
        "config": {
            "run": {"seed": 3},
            "model": {
                "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20,
                "n_att_experts": 4, "n_mlp_experts": 8, "k_att": 2, "k_mlp": 3, "gating_size": 8,
                "bos_token_id": None, "eos_token_id": 0, **(model or {}),
            },
            "data": {"train": [{"path": str(prefix)}]},
            "losses": {"balance": "mi", "balance_weight": 0.05, "z_weight": 0.01, **losses},
            "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 3, "clip": 0.5},
            "train": {"steps": STEPS, "seq_len": 24, "micro_batch": micro_batch, "global_batch": 8,
                "activation_checkpointing": recompute, **(train or {})},
            "parallel": parallel,
            "deepspeed": str(deepspeed),
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(corpus, launch, tmp_path_factory) -> Path:
    """Everything that the process groups of 1, 2 and 4 ranks saw."""
    out = tmp_path_factory.mktemp("parity")
    cases = {f"ep{ep}-zero{stage}": case(corpus, ep=ep, stage=stage, micro_batch=2) for ep, stage in LAYOUTS}
    for ep, stage in ((1, 1), (4, 0), (2, 2), (2, 3)):
        cases[f"accumulated-ep{ep}-zero{stage}"] = case(corpus, ep=ep, stage=stage, micro_batch=1, steps=SHORT)
    for ep, stage in ((2, 1), (2, 2), (2, 3)):
        cases[f"offload-ep{ep}-zero{stage}"] = case(
            corpus, ep=ep, stage=stage, micro_batch=1, steps=SHORT, offload=True
        )
    for ep, stage, recompute in ((2, 1, "none"), (4, 2, "none"), (2, 0, "full"), (2, 3, "none"), (4, 3, "full")):
        micro_batch = 1 if recompute == "full" else 2
        cases[f"weights-ep{ep}-zero{stage}"] = case(
            corpus, ep=ep, stage=stage, micro_batch=micro_batch, steps=SHORT, travels="weights", recompute=recompute
        )
    for ep, stage, recompute in ((4, 1, "full"), (2, 3, "full"), (4, 3, "experts")):
        chunks = {"loss_chunk": 10}
        cases[f"recomputed-ep{ep}-zero{stage}"] = case(
            corpus, ep=ep, stage=stage, micro_batch=1, steps=SHORT, recompute=recompute, train=chunks
        )
    cases["gmm-zero3"] = case(corpus, ep=4, stage=3, micro_batch=1, steps=2, **GMM)
    for ep, stage, offload in ((1, 1, False), (2, 3, False), (4, 3, True)):
        cases[f"bf16-ep{ep}-zero{stage}"] = case(
            corpus, ep=ep, stage=stage, micro_batch=2, steps=SHORT, offload=offload, train={"precision": "bf16"}
        )
    for ep, stage in UNEVEN_LAYOUTS:
        cases[f"uneven-ep{ep}-zero{stage}"] = case(corpus, ep=ep, stage=stage, micro_batch=1, steps=SHORT, **UNEVEN)
    for ep, stage in ((2, 1), (4, 3)):
        cases[f"uneven-weights-ep{ep}-zero{stage}"] = case(
            corpus, ep=ep, stage=stage, micro_batch=2, steps=SHORT, travels="weights", **UNEVEN
        )
    cases["switch"] = case(corpus, ep=2, stage=1, micro_batch=1, steps=2, balance="switch")
    for scope in ("micro_batch", "rank"):
        cases[f"scope-{scope}"] = case(corpus, ep=4, stage=1, micro_batch=2, steps=2, scope=scope)
        cases[f"accumulated-{scope}"] = case(corpus, ep=4, stage=1, micro_batch=1, steps=2, scope=scope)
    alone = {
        "alone": case(corpus, ep=1, stage=0, micro_batch=8),
        "alone-accumulated": case(corpus, ep=1, stage=0, micro_batch=2),
        "alone-rank": case(corpus, ep=1, stage=0, micro_batch=8, steps=2, scope="rank"),
        "alone-switch": case(corpus, ep=1, stage=1, micro_batch=8, steps=2, balance="switch"),
        "alone-uneven": case(corpus, ep=1, stage=0, micro_batch=8, steps=SHORT, **UNEVEN),
        "alone-zero3": case(corpus, ep=1, stage=3, micro_batch=8),
        "alone-gmm": case(corpus, ep=1, stage=0, micro_batch=8, steps=2, **GMM),
    }
    launch("layout_worker.py", 1, alone, out / "one")
    pairs = {
        f"ep{ep}-zero{stage}": case(corpus, ep=ep, stage=stage, micro_batch=4, steps=SHORT)
        for ep in (1, 2)
        for stage in (0, 1, 2, 3)
    }
    for stage in (0, 2):
        pairs[f"uneven-ep2-zero{stage}"] = case(corpus, ep=2, stage=stage, micro_batch=4, steps=SHORT, **UNEVEN)
    launch("layout_worker.py", 2, pairs, out / "two")
    launch("layout_worker.py", 4, cases, out / "four")
    return out


def oracle(config: RunConfig) -> tuple[dict[str, torch.Tensor], float, float, float]:
    """Gradients, cross entropy, added losses and norm of the first global batch, in float64 by plain autograd."""
    model = ModuleFormer(config.model).double()
    initialise(model, config.model, config.run.seed)
    loader = StepLoader(
        open_train(config), global_batch=8, micro_batch=8, rank=0, num_ranks=1, eod_id=0, document_mask=True
    )
    with loader:
        [batch] = loader.step(0)
    output = model(batch.input_BT, start_BT=batch.start_BT)
    cross_entropy = F.cross_entropy(model.logits(output.hidden_BTD).flatten(0, 1), batch.label_BT.flatten())
    added = 0.0
    for stats in output.stats:
        mean_E = stats.prob_E / stats.tokens
        z = stats.logsumexp2 / stats.tokens
        if config.losses.balance == "mi":
            balance = stats.entropy / stats.tokens + (mean_E * (mean_E + 1e-8).log()).sum()
        else:
            load_E = stats.count_E / stats.count_E.sum()
            balance = len(mean_E) * (mean_E * load_E).sum() + 0.1 * z
        added = added + config.losses.balance_weight * balance + config.losses.z_weight * z
    (cross_entropy + added).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    return gradients, cross_entropy.item(), added.item(), norm


def assert_agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Gradients and the weights after one step to 1e-5 of their norm; that step itself to 1e-4 of its own."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = (found[name].double() - value.double()).norm()
        kind, parameter = name.split("/")
        if kind == "initial":
            assert difference == 0, f"{name} depends on the layout"
            continue
        error = difference / value.double().norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"
        if kind == "stepped":
            # Where a gradient is hardly larger than AdamW's epsilon, its rounding is magnified in the step.
            step = (value.double() - wanted[f"initial/{parameter}"].double()).norm()
            assert difference / step < 1e-4, f"{name}: relative error of the step {difference / step:.2e}"


@pytest.mark.parametrize("kind", ["mi", "switch"])
def test_one_process_matches_float64_oracle(results, corpus, kind):
    name = "alone" if kind == "mi" else "alone-switch"
    config = validate(case(corpus, ep=1, stage=0, micro_batch=8, balance=kind)["config"])
    gradients, cross_entropy, added, norm = oracle(config)
    seen = json.loads((results / "one" / f"{name}.json").read_text())
    tensors = load_file(results / "one" / f"{name}.safetensors")
    found = {key: value for key, value in tensors.items() if key.startswith("gradient/")}
    assert_agree(found, {f"gradient/{key}": gradient for key, gradient in gradients.items()})
    assert seen["loss"][0] == pytest.approx(cross_entropy, rel=1e-6)
    assert seen["aux_loss"][0] == pytest.approx(added, rel=1e-5)
    assert seen["grad_norm"][0] == pytest.approx(norm, rel=1e-5)


NAMES = [f"four/ep{ep}-zero{stage}" for ep, stage in LAYOUTS]
ACCUMULATED = [f"four/accumulated-{name}" for name in ("ep1-zero1", "ep4-zero0", "ep2-zero2", "ep2-zero3")]
OFFLOADED = [f"four/offload-ep2-zero{stage}" for stage in (1, 2, 3)]
TRAVELS = [f"four/weights-{name}" for name in ("ep2-zero1", "ep4-zero2", "ep2-zero0", "ep2-zero3", "ep4-zero3")]
RECOMPUTED = [f"four/recomputed-{name}" for name in ("ep4-zero1", "ep2-zero3", "ep4-zero3")]
PAIRS = [f"two/ep{ep}-zero{stage}" for ep in (1, 2) for stage in (0, 1, 2, 3)]
EXTRA = [*ACCUMULATED, *OFFLOADED, *TRAVELS, *RECOMPUTED, *PAIRS]


@pytest.mark.parametrize("name", [*NAMES, *EXTRA, "one/alone-zero3"])
def test_layout_matches_one_process(results, name):
    wanted = json.loads((results / "one" / "alone.json").read_text())
    found = json.loads((results / f"{name}.json").read_text())
    assert_agree(load_file(results / f"{name}.safetensors"), load_file(results / "one" / "alone.safetensors"))
    steps = len(found["loss"])
    assert steps in (SHORT, STEPS)
    for key in ("loss", "aux_loss"):
        np.testing.assert_allclose(found[key], wanted[key][:steps], atol=1e-4, rtol=0, err_msg=key)
    assert found["grad_norm"][0] == pytest.approx(wanted["grad_norm"][0], rel=1e-5)
    np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"][:steps], rtol=1e-2)
    assert wanted["loss"][-1] < wanted["loss"][0] - 0.3, "nothing was learnt: the comparison would prove little"


UNEVEN_NAMES = [f"four/uneven-ep{ep}-zero{stage}" for ep, stage in UNEVEN_LAYOUTS]
UNEVEN_NAMES += ["two/uneven-ep2-zero0", "two/uneven-ep2-zero2"]
UNEVEN_NAMES += ["four/uneven-weights-ep2-zero1", "four/uneven-weights-ep4-zero3"]


@pytest.mark.parametrize("name", UNEVEN_NAMES)
def test_layers_with_different_numbers_of_experts(results, name):
    """Numbers that ranks cannot share evenly: some ranks hold one expert more than others, in some layers."""
    assert_agree(load_file(results / f"{name}.safetensors"), load_file(results / "one" / "alone-uneven.safetensors"))
    wanted = json.loads((results / "one" / "alone-uneven.json").read_text())
    found = json.loads((results / f"{name}.json").read_text())
    for key in ("loss", "aux_loss"):
        np.testing.assert_allclose(found[key], wanted[key], atol=1e-4, rtol=0, err_msg=key)
    np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-2)


def test_pieces_of_every_kind_of_router_and_the_routing_norm(results):
    """The gmm router's centroids and the norm of all routers' rows are used far from the modules that own them."""
    assert_agree(
        load_file(results / "four" / "gmm-zero3.safetensors"), load_file(results / "one" / "alone-gmm.safetensors")
    )
    wanted = json.loads((results / "one" / "alone-gmm.json").read_text())
    found = json.loads((results / "four" / "gmm-zero3.json").read_text())
    for key, values in wanted.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["bf16-ep2-zero3", "bf16-ep4-zero3"])
def test_low_precision_trains_alike(results, name):
    """bfloat16 rounds at 2^-9: losses agree to about that; nothing like this is left when experts are mixed up."""
    wanted = json.loads((results / "four" / "bf16-ep1-zero1.json").read_text())
    found = json.loads((results / "four" / f"{name}.json").read_text())
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-2)
    np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=3e-2)


def test_accumulation_on_one_process_changes_nothing(results):
    wanted = json.loads((results / "one" / "alone.json").read_text())
    found = json.loads((results / "one" / "alone-accumulated.json").read_text())
    for key, values in wanted.items():
        np.testing.assert_allclose(found[key], values, atol=1e-4, err_msg=key)


def test_switch_loss_is_global(results):
    wanted = json.loads((results / "one" / "alone-switch.json").read_text())
    found = json.loads((results / "four" / "switch.json").read_text())
    for key, values in wanted.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-4, err_msg=key)


def test_scopes(results):
    """micro_batch is the global batch where there is one micro step, and the rank's where there is one rank."""

    def first(group: str, name: str) -> dict[str, float]:
        return {key: values[0] for key, values in json.loads((results / group / f"{name}.json").read_text()).items()}

    wanted = first("one", "alone")
    for group, name in (("one", "alone-rank"), ("four", "scope-micro_batch")):
        assert first(group, name) == pytest.approx(wanted, rel=1e-5), name
    # Smaller scopes see less even loads: their entropy H(m) is lower, so the balance loss H(m|x) - H(m) is higher.
    losses = [
        wanted,
        first("four", "accumulated-micro_batch"),
        first("four", "scope-rank"),
        first("four", "accumulated-rank"),
    ]
    aux = [loss["aux_loss"] for loss in losses]
    assert aux[0] < aux[1] < aux[3] and aux[0] < aux[2] < aux[3]
    assert all(loss["loss"] == pytest.approx(wanted["loss"], rel=1e-6) for loss in losses)
