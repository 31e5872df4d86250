"""The DeepSpeed glue: its JSON filled from the run configuration, expert parameters declared, the engine built.

What its engine needs to treat expert parameters rightly at ZeRO 0-2: each carries `allreduce = False` and the name
of its expert group, sits in a parameter group with `moe: True`, and some module is a `deepspeed.moe.layer.MoE`.
Without the last, stages 0-2 crash. ZeRO 3 refuses that module; there some module must be one of its AutoEP layers and
each expert parameter placed as theirs are (see `pieces`). Without that it trains silently wrong: experts are broadcast
from rank 0 and averaged over all ranks. Hence the guards below.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamf.apex import fused_adam
from megamf.config import ConfigError, RunConfig
from megamf.config.run import Optim
from megamf.model import ModuleFormer, initialise
from megamf.model.backends import Backends
from megamf.model.init import expert_indices
from megamf.model.objective import Objective
from megamf.parallel import pieces
from megamf.parallel.context import make_context
from megamf.parallel.dispatch import Dispatchers, slots_of_experts
from megamf.parallel.mesh import Mesh

STAGES = (0, 1, 2, 3)
# What these do to experts, or to the state that checkpoints are made of, is not known: all but "off" is refused.
REFUSED = {
    "offload_param": ({"device": "none"}, "weights stay on the device: use offload_optimizer, more ranks, or stage 3"),
    "zero_hpz_partition_size": (1, "a second copy of the pieces in each node knows no experts: leave it out"),
    "zero_quantized_weights": (False, "weights are gathered in their own precision: leave it out"),
    "zero_quantized_nontrainable_weights": (False, "all weights are trained: leave it out"),
    "zero_quantized_gradients": (False, "gradients are summed in fp32: leave it out"),
    "mics_shard_size": (-1, "MiCS knows no experts: leave it out"),
    "zenflow": (None, "its optimizer keeps state that checkpoints do not hold: leave it out"),
}
REFUSED_OFFLOAD = {
    "super_offload": (False, "it needs DeepSpeed's own Adam, megamf's is torch's: leave it out"),
    "ratio": (1, "it needs DeepSpeed's own Adam, megamf's is torch's: leave it out"),
}


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
        known = ", ".join(map(str, STAGES))
        raise ConfigError(f"{config.deepspeed}: zero_optimization.stage={stage} is not supported; stages: {known}")
    if stage == 0 and config.train.precision == "bf16":
        raise ConfigError(
            "train.precision=bf16 needs fp32 master weights, which DeepSpeed keeps from ZeRO stage 1 on, but "
            f"{config.deepspeed} has stage 0: use deepspeed=zero1"
        )
    _check_zero(filled["zero_optimization"], config)
    if stage == 3 and config.parallel.ep > 1 and config.model.sparse:
        _autoep_layer()
    if stage == 3 and config.tune.strategy == "lora":
        raise ConfigError(
            f"{config.deepspeed}: ZeRO stage 3 cuts up weights before tune.strategy=lora puts adapters beside them: "
            "use deepspeed=zero2 or zero2_offload"
        )
    if stage == 3 and config.tune.strategy != "full":
        raise ConfigError(
            f"{config.deepspeed}: ZeRO stage 3 trains whole tensors, tune.strategy={config.tune.strategy} parts of "
            "them: use deepspeed=zero2 or zero2_offload"
        )
    if stage == 0:
        # Its stage 0 clips by the mean of the ranks' norms, which is wrong as soon as experts differ between ranks.
        filled["gradient_clipping"] = 0.0
    if config.train.precision == "bf16":
        filled.setdefault("communication_data_type", "fp32")
    # It counts a micro batch for every rank, also where several ranks share the same sequences.
    filled["train_batch_size"] = config.train.global_batch * config.parallel.context
    filled["zero_allow_untested_optimizer"] = True
    # torch's fused AdamW runs on the CPU too, vectorised; DeepSpeed's would be compiled at the first start.
    filled["zero_force_ds_cpu_optimizer"] = False
    filled["steps_per_print"] = 2**31 - 1
    return filled


def _check_zero(zero: dict[str, Any], config: RunConfig) -> None:
    """Raise ConfigError for settings of ZeRO that this glue does not know to be right."""
    offload = zero.get("offload_optimizer") or {}
    for section, prefix, refused in ((zero, "", REFUSED), (offload, "offload_optimizer.", REFUSED_OFFLOAD)):
        for key, (off, advice) in refused.items():
            if section.get(key) not in (None, off):
                raise ConfigError(
                    f"{config.deepspeed}: zero_optimization.{prefix}{key}={section[key]} is not supported: {advice}"
                )
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        raise ConfigError(f"{config.deepspeed}: offload_optimizer.device={device!r} is not supported: none or cpu")
    if device == "cpu" and zero["stage"] == 0:
        raise ConfigError(
            f"{config.deepspeed}: offload_optimizer needs ZeRO stage 1, 2 or 3, the stage is 0: "
            "use deepspeed=zero2_offload"
        )
    if device == "cpu" and config.optim.implementation == "apex":
        raise ConfigError(
            f"{config.deepspeed}: offload_optimizer updates on the CPU, optim.implementation=apex on a GPU: "
            "set optim.implementation=torch"
        )


def _autoep_layer() -> type[nn.Module]:
    """The class by which DeepSpeed's ZeRO 3 knows that there are experts. Raises ConfigError where it is missing."""
    try:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        if hasattr(DeepSpeedZeroOptimizer_Stage3, "_autoep_expert_parallel_group"):
            return AutoEPMoELayer
    except ImportError:
        pass
    import deepspeed

    raise ConfigError(
        f"ZeRO stage 3 with parallel.ep > 1 needs DeepSpeed 0.19.8 or newer, this is {deepspeed.__version__}: install "
        "it, or use parallel.ep=1, or deepspeed=zero2"
    )


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
            groups.setdefault((name in experts, len(pieces.full_shape(parameter)) >= 2), []).append(parameter)
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


def build_model(config: RunConfig, mesh: Mesh, dispatchers: Dispatchers) -> ModuleFormer:
    """The model with this rank's experts and its initial weights, which no layout changes. Collective.

    At ZeRO 3 the parameters are in pieces from the start: the whole model is never in one place.
    """
    filled = deepspeed_config(config, mesh.world)
    in_pieces = filled["zero_optimization"]["stage"] == 3
    with torch.device("meta") if in_pieces else nullcontext():
        model = ModuleFormer(
            config.model,
            dispatchers.mlp,
            Backends.of(config),
            make_context(mesh, recomputed=config.train.activation_checkpointing == "full"),
            attention_dispatcher=dispatchers.attention,
        )
    if in_pieces:
        pieces.fill_in_pieces(model, config.model, config.run.seed, mesh, filled)
    else:
        initialise(model, config.model, config.run.seed)
    return model


def build_engine(objective: Objective, config: RunConfig, mesh: Mesh):
    """deepspeed.initialize with expert groups and AdamW (fused) for a model of `build_model`. Collective."""
    import deepspeed

    filled = deepspeed_config(config, mesh.world)
    stage = filled["zero_optimization"]["stage"]
    model = objective.model
    # At stage 3 with ep=1 experts are parameters like all others: every rank holds the same ones.
    experts = expert_indices(model) if stage < 3 or mesh.ep > 1 else {}
    parameters = dict(model.named_parameters())
    for name in experts:
        parameters[name].allreduce = False
        parameters[name].group_name = mesh.group_name
    if experts:
        objective.expert_marker = _expert_marker(stage, config, mesh)
    if stage == 3:
        pieces.declare_uses(objective)
        pieces.gather_in_one_order(parameters.values())
    optimizer = make_optimizer(parameter_groups(model, config.optim, experts), config.optim)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=filled)
    check_engine(engine, [parameters[name] for name in experts], mesh)
    return engine


def _expert_marker(stage: int, config: RunConfig, mesh: Mesh) -> nn.Module:
    """What tells the engine that there are expert parameters; holds none and computes nothing."""
    if stage == 3:
        base = _autoep_layer()
    else:
        from deepspeed.moe.layer import MoE as base

    class ExpertsInside(base):
        """Found by its class in the engine's walk over the modules."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = config.model.n_mlp_experts
            self.num_local_experts = slots_of_experts(config.model.n_mlp_experts, mesh.ep)
            self.ep_size = mesh.ep
            self.expert_group_name = mesh.group_name

        def set_deepspeed_parallelism(self, *arguments: Any, **options: Any) -> None:
            """The groups exist already."""

    return ExpertsInside()


def check_engine(engine: Any, experts: Sequence[nn.Parameter], mesh: Mesh) -> None:
    """Refuse an engine that would average experts of different ranks; raises RuntimeError."""
    if not experts:
        return
    stage = engine.zero_optimization_stage()
    if not engine.has_moe_layers or stage not in STAGES:
        raise RuntimeError(
            f"DeepSpeed did not recognise the expert parameters at ZeRO stage {stage} (stages: {STAGES}): it would "
            "average them over all ranks"
        )
    if stage == 3:
        wanted = dist.get_process_group_ranks(mesh.edp_group)
        for parameter in experts:
            found = dist.get_process_group_ranks(parameter.ds_process_group)
            if found != wanted or parameter.ds_zero_placement_family != "autoep_expert":
                raise RuntimeError(
                    f"DeepSpeed cut an expert tensor {tuple(parameter.ds_shape)} over the ranks {found}, its replicas "
                    f"are on {wanted}"
                )


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
