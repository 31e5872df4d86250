"""The DeepSpeed glue: its JSON filled from the run configuration, expert parameters declared, the engine built.

What its engine needs to treat expert parameters rightly at ZeRO 0-2: each carries `allreduce = False` and the name
of its expert group, sits in a parameter group with `moe: True`, and some module is a `deepspeed.moe.layer.MoE`.
Without the last, stages 0-2 crash and stage 3 trains silently wrong (experts are broadcast from rank 0 and averaged
over all ranks); hence the guards below.
"""

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamf.apex import fused_adam
from megamf.config import ConfigError, RunConfig
from megamf.config.run import Optim
from megamf.model.init import expert_indices
from megamf.model.objective import Objective
from megamf.parallel.mesh import Mesh

STAGES = (0, 1, 2)


def deepspeed_config(config: RunConfig, num_ranks: int) -> dict[str, Any]:
    """The JSON that `config.deepspeed` names, each "auto" replaced from the run configuration.

    Raises ConfigError for a missing or malformed file, a value that contradicts the run configuration (both are
    printed), or a combination that DeepSpeed would train wrongly.
    """
    tree = _read(config.deepspeed)
    ours = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps(num_ranks),
        "train_batch_size": config.train.global_batch,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.train.precision == "bf16"},
    }
    filled = _fill(tree, ours, config.deepspeed)
    for key in ("optimizer", "scheduler"):
        if key in filled:
            raise ConfigError(f"{config.deepspeed} has a section {key!r}; megamf's own section is `optim`: remove it")
    if filled.get("fp16", {}).get("enabled"):
        raise ConfigError(
            f"{config.deepspeed} turns fp16 on; train.precision is {config.train.precision}: fp32 or bf16"
        )
    stage = filled.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage not in STAGES:
        raise ConfigError(f"{config.deepspeed}: zero_optimization.stage={stage} is not supported; stages: 0, 1, 2")
    if stage == 0 and config.train.precision == "bf16":
        raise ConfigError(
            "train.precision=bf16 needs fp32 master weights, which DeepSpeed keeps from ZeRO stage 1 on, but "
            f"{config.deepspeed} has stage 0: use deepspeed=zero1"
        )
    if filled["zero_optimization"].get("offload_optimizer"):
        raise ConfigError(f"{config.deepspeed}: offload_optimizer is not supported")
    if stage == 0:
        # Its stage 0 clips by the mean of the ranks' norms, which is wrong as soon as experts differ between ranks.
        filled["gradient_clipping"] = 0.0
    if config.train.precision == "bf16":
        filled.setdefault("communication_data_type", "fp32")
    # It counts a micro batch for every rank, also where several ranks share the same sequences.
    filled["train_batch_size"] = config.train.global_batch * config.parallel.context
    filled["zero_allow_untested_optimizer"] = True
    filled["steps_per_print"] = 2**31 - 1
    return filled


def _read(name: str) -> dict[str, Any]:
    packaged = resources.files("megamf.ds_configs") / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    if not path.is_file():
        known = sorted(
            Path(e.name).stem for e in resources.files("megamf.ds_configs").iterdir() if e.name.endswith(".json")
        )
        raise ConfigError(f"deepspeed={name} is neither a packaged configuration ({', '.join(known)}) nor a file")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(tree).__name__}")
    return tree


def _fill(tree: dict[str, Any], ours: dict[str, Any], origin: str, prefix: str = "") -> dict[str, Any]:
    filled = dict(tree)
    for key, value in ours.items():
        if isinstance(value, dict):
            filled[key] = _fill(tree.get(key, {}), value, origin, f"{prefix}{key}.")
        elif tree.get(key, "auto") == "auto":
            filled[key] = value
        elif tree[key] != value:
            raise ConfigError(
                f"{origin} says {prefix}{key}={tree[key]!r}, the run configuration says {value!r}: "
                'make them equal or write "auto" in the JSON'
            )
    left = [key for key, value in filled.items() if value == "auto"]
    if left:
        raise ConfigError(f'{origin}: {prefix}{left[0]} is "auto", but the run configuration has nothing to fill in')
    return filled


def parameter_groups(model: nn.Module, optim: Optim, experts: Iterable[str] = ()) -> list[dict[str, Any]]:
    """AdamW's groups: {dense, expert} x {decayed, not}. Matrices and stacks of matrices decay, vectors do not."""
    experts = set(experts)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in experts, parameter.dim() >= 2), []).append(parameter)
    found = []
    for (expert, decayed), parameters in sorted(groups.items()):
        weight_decay = optim.weight_decay if decayed else 0.0
        group = {"params": parameters, "weight_decay": weight_decay, "name": f"dense decay={decayed}"}
        if expert:
            # DeepSpeed reads the name of an expert group as the name of its process groups.
            group.update(name=parameters[0].group_name, moe=True)
        found.append(group)
    return found


def make_optimizer(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or NVIDIA apex's. Raises UserError when that is not installed."""
    settings = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.implementation == "apex":
        return fused_adam()(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def build_engine(objective: Objective, config: RunConfig, mesh: Mesh):
    """deepspeed.initialize with expert groups and AdamW (fused). Collective. Returns the engine."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    class ExpertsInside(MoE):
        """Tells the engine that there are expert parameters; holds none and computes nothing."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = config.model.n_mlp_experts
            self.num_local_experts = config.model.n_mlp_experts // mesh.ep
            self.ep_size = mesh.ep
            self.expert_group_name = mesh.group_name

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already."""

    model = objective.model
    experts = expert_indices(model)
    parameters = dict(model.named_parameters())
    for name in experts:
        parameters[name].allreduce = False
        parameters[name].group_name = mesh.group_name
    if experts:
        objective.expert_marker = ExpertsInside()
    filled = deepspeed_config(config, mesh.world)
    optimizer = make_optimizer(parameter_groups(model, config.optim, experts), config.optim)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=filled)
    check_engine(engine, bool(experts))
    return engine


def check_engine(engine: Any, has_experts: bool) -> None:
    """Refuse an engine that would average experts of different ranks; raises RuntimeError."""
    if has_experts and not engine.has_moe_layers:
        raise RuntimeError("DeepSpeed did not recognise the expert parameters: it would average them over all ranks")
    if has_experts and engine.zero_optimization_stage() not in STAGES:
        raise RuntimeError(f"ZeRO stage {engine.zero_optimization_stage()} trains experts wrongly; stages: 0, 1, 2")


def clip_gradients(engine: Any, mesh: Mesh, max_norm: float) -> torch.Tensor:
    """Stage 0 only: the norm over dense parameters and all ranks' experts; scales the gradients in place.

    max_norm 0 measures without clipping. Returns the norm before clipping (float32 scalar).
    """
    square = {True: [], False: []}
    gradients = []
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            square[getattr(parameter, "allreduce", True)].append(parameter.grad.float().square().sum())
    device = gradients[0].device
    dense = torch.stack(square[True]).sum() if square[True] else torch.zeros((), device=device)
    expert = torch.stack(square[False]).sum() if square[False] else torch.zeros((), device=device)
    if mesh.ep > 1:
        dist.all_reduce(expert, group=mesh.ep_group)
    norm = (dense + expert).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm
