"""Training state of a DeepSpeed engine as logical tensors: out for a checkpoint, in from one, for any layout.

Shapes: L local experts. Names are `GROUP/NAME` with the groups of `megamf.checkpoint`; an expert tensor [L, in, out]
leaves as one tensor [in, out] for every expert. Everything goes through DeepSpeed's per-parameter accessors; at stage
0 the state is the torch optimizer's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from megamf.checkpoint import Checkpoint
from megamf.model.init import expert_indices
from megamf.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


def owned_state(engine: Any, mesh: Mesh) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the logical tensors that this rank writes. Collective: every rank must exhaust it.

    Replicas share the work: replica e mod edp writes expert e, dense tensors go round the ranks.
    The tensors may be views of live memory: copy them before training goes on.
    """
    model = engine.module.model
    experts = expert_indices(model)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        for group, tensor in _parameter_state(engine, parameter):
            if name in experts:
                for local, expert in enumerate(experts[name]):
                    if expert % mesh.edp == mesh.edp_rank:
                        yield f"{group}/{name}.{expert}", tensor[local]
            elif index % mesh.world == mesh.rank:
                yield f"{group}/{name}", tensor


def full_gradients(engine: Any, mesh: Mesh) -> dict[str, torch.Tensor]:
    """State-dict key -> gradient of the whole logical tensor on the global batch, float32 on the CPU; on every rank.

    To be called between the last backward of a step and the step itself. Collective; for tests and diagnosis.
    """
    model = engine.module.model
    experts = expert_indices(model)
    found = {}
    for name, parameter in model.named_parameters():
        gradient = safe_get_full_grad(parameter).detach().float().reshape(parameter.shape).contiguous()
        if name in experts and mesh.ep > 1:
            shares = [torch.empty_like(gradient) for _ in range(mesh.ep)]
            dist.all_gather(shares, gradient, group=mesh.ep_group)
            gradient = torch.cat(shares)
        found[name] = gradient.cpu().clone()
    return found


def global_shapes(model: torch.nn.Module, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """State-dict key -> shape of the whole logical tensor (all experts), whatever share this rank holds."""
    experts = expert_indices(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: (shape[0] * mesh.ep, *shape[1:]) if name in experts else shape for name, shape in shapes.items()}


def expected_names(engine: Any, mesh: Mesh) -> set[str]:
    """The names that all ranks together write."""
    model = engine.module.model
    experts = expert_indices(model)
    names = set()
    for name, parameter in model.named_parameters():
        groups = ["weights", *MOMENTS] + (["master"] if parameter.dtype != torch.float32 else [])
        count = len(experts[name]) * mesh.ep if name in experts else 0
        suffixes = [f".{expert}" for expert in range(count)] if count else [""]
        names.update(f"{group}/{name}{suffix}" for group in groups for suffix in suffixes)
    return names


def refresh_masters(engine: Any) -> None:
    """After the weights were changed from outside: the optimizer's fp32 copies follow them."""
    if engine.zero_optimization_stage() > 0:
        for parameter in engine.module.model.parameters():
            safe_set_full_fp32_param(parameter, parameter.detach().float())


def _parameter_state(engine: Any, parameter: torch.nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weights", parameter.detach()
    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        yield from ((key, state[key]) for key in MOMENTS)
        return
    if parameter.dtype != torch.float32:
        yield "master", safe_get_full_fp32_param(parameter)
    yield from ((key, safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS)


def optimizer_step(engine: Any) -> int:
    """How many updates AdamW has made."""
    optimizer = torch_optimizer(engine)
    holders = optimizer.param_groups if _counts_in_groups(optimizer) else optimizer.state.values()
    return int(next((holder["step"] for holder in holders if "step" in holder), 0))


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """NVIDIA apex counts its updates once a parameter group, torch with every tensor."""
    return not isinstance(optimizer, torch.optim.AdamW)


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside whatever wraps it."""
    optimizer = engine.optimizer
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


@torch.no_grad()
def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the parameters of a model (a rank's share of it) with the best precision the checkpoint has."""
    experts = expert_indices(model)
    masters = set(checkpoint.logical_shapes("master"))
    for name, parameter in model.named_parameters():
        group = "master" if name in masters else "weights"
        parameter.copy_(_read(checkpoint, name, group, experts))


@torch.no_grad()
def load_state(engine: Any, checkpoint: Checkpoint, step: int) -> None:
    """Fill weights, masters and moments from a checkpoint written by any layout; AdamW's count becomes `step`."""
    model = engine.module.model
    experts = expert_indices(model)
    optimizer = torch_optimizer(engine)
    if _counts_in_groups(optimizer):
        for group in optimizer.param_groups:
            group["step"] = step
    else:
        for state in optimizer.state.values():
            state["step"].fill_(step)
    masters = set(checkpoint.logical_shapes("master"))
    for name, parameter in model.named_parameters():
        weights = _read(checkpoint, name, "weights", experts)
        master = _read(checkpoint, name, "master", experts) if name in masters else weights.float()
        # A run that changes its precision continues from the better copy.
        parameter.copy_(weights if parameter.dtype == weights.dtype else master)
        moments = {key: _read(checkpoint, name, key, experts).to(parameter.device) for key in MOMENTS}
        if engine.zero_optimization_stage() == 0:
            state = engine.optimizer.state[parameter]
            for key, value in moments.items():
                state[key].copy_(value)
            continue
        safe_set_full_fp32_param(parameter, master.to(parameter.device))
        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, key)


def _read(checkpoint: Checkpoint, name: str, group: str, experts: dict[str, range]) -> torch.Tensor:
    if name in experts:
        return checkpoint.stacked(name, list(experts[name]), group)
    return checkpoint.full(name, group)


def create_moments(engine: Any) -> None:
    """Zero moments where AdamW would create them at its first step.

    DeepSpeed links a parameter's accessors to its slice of the moments during the first group's first step, when the
    other groups have none yet, and never again; so they must be there before.
    """
    optimizer = torch_optimizer(engine)
    in_groups = _counts_in_groups(optimizer)
    for group in optimizer.param_groups:
        if in_groups:
            group["step"] = 0
        for tensor in group["params"]:
            optimizer.state[tensor] = {key: torch.zeros_like(tensor) for key in MOMENTS}
            if not in_groups:
                optimizer.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
    if engine.zero_optimization_stage() > 0:
        engine.optimizer._lazy_init_hp_params_optimizer_state()
