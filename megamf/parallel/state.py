"""Training state of a DeepSpeed engine as logical tensors: out for a checkpoint, in from one, for any layout.

Shapes: L local experts. Names are `GROUP/NAME` with the groups of `megamf.checkpoint`; an expert tensor [L, in, out]
leaves as one tensor [in, out] for every expert. Everything goes through DeepSpeed's per-parameter accessors, one
parameter at a time; at stage 0 the state is the torch optimizer's own, at stage 3 the weights are gathered too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from megamf.checkpoint import Checkpoint
from megamf.model.init import expert_counts, expert_indices
from megamf.parallel import pieces
from megamf.parallel.dispatch import share_of_experts
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
    return _whole(engine, mesh, safe_get_full_grad)


def full_weights(engine: Any, mesh: Mesh) -> dict[str, torch.Tensor]:
    """State-dict key -> the whole logical tensor, float32 on the CPU; on every rank. Collective; as above."""
    return _whole(engine, mesh, _weights)


def _whole(engine: Any, mesh: Mesh, get: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    model = engine.module.model
    counts = expert_counts(model)
    found = {}
    for name, parameter in model.named_parameters():
        share = get(parameter).detach().float().reshape(pieces.full_shape(parameter)).contiguous()
        if name in counts and mesh.ep > 1:
            shares = [torch.empty_like(share) for _ in range(mesh.ep)]
            dist.all_gather(shares, share, group=mesh.ep_group)
            sizes = [len(share_of_experts(counts[name], rank, mesh.ep)) for rank in range(mesh.ep)]
            share = torch.cat([part[:size] for part, size in zip(shares, sizes)])
        found[name] = share.cpu().clone()
    return found


def global_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """State-dict key -> shape of the whole logical tensor (all experts), whatever share this rank holds."""
    counts = expert_counts(model)
    shapes = {name: tuple(pieces.full_shape(parameter)) for name, parameter in model.named_parameters()}
    return {name: (counts.get(name, shape[0]), *shape[1:]) for name, shape in shapes.items()}


def expected_names(engine: Any) -> set[str]:
    """The names that all ranks together write."""
    model = engine.module.model
    counts = expert_counts(model)
    names = set()
    for name, parameter in model.named_parameters():
        groups = ["weights", *MOMENTS] + (["master"] if parameter.dtype != torch.float32 else [])
        suffixes = [f".{expert}" for expert in range(counts[name])] if name in counts else [""]
        names.update(f"{group}/{name}{suffix}" for group in groups for suffix in suffixes)
    return names


def refresh_masters(engine: Any) -> None:
    """After the weights were changed from outside: the optimizer's fp32 copies follow them."""
    if engine.zero_optimization_stage() > 0:
        for parameter in engine.module.model.parameters():
            _set_master(parameter, _weights(parameter).float())


def _parameter_state(engine: Any, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weights", _weights(parameter)
    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        yield from ((key, state[key]) for key in MOMENTS)
        return
    if parameter.dtype != torch.float32:
        yield "master", safe_get_full_fp32_param(parameter)
    yield from ((key, safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS)


def _weights(parameter: nn.Parameter) -> torch.Tensor:
    """The whole weights, live where they are whole."""
    return pieces.gathered(parameter) if pieces.in_pieces(parameter) else parameter.detach()


def _set_weights(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if pieces.in_pieces(parameter):
        pieces.assign(parameter, value)
    else:
        parameter.copy_(value)


def _set_master(parameter: nn.Parameter, value: torch.Tensor) -> None:
    setter = pieces.set_master if pieces.in_pieces(parameter) else safe_set_full_fp32_param
    setter(parameter, value)


def _set_moment(parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
    setter = pieces.set_moment if pieces.in_pieces(parameter) else safe_set_full_optimizer_state
    setter(parameter, value, key)


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
def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the parameters of a model (a rank's share of it) with the best precision the checkpoint has."""
    experts = expert_indices(model)
    masters = set(checkpoint.logical_shapes("master"))
    for name, parameter in model.named_parameters():
        group = "master" if name in masters else "weights"
        _set_weights(parameter, _read(checkpoint, name, group, parameter, experts))


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
        weights = _read(checkpoint, name, "weights", parameter, experts)
        master = _read(checkpoint, name, "master", parameter, experts) if name in masters else weights.float()
        # A run that changes its precision continues from the better copy.
        _set_weights(parameter, weights if parameter.dtype == weights.dtype else master)
        moments = {key: _read(checkpoint, name, key, parameter, experts).to(parameter.device) for key in MOMENTS}
        if engine.zero_optimization_stage() == 0:
            state = engine.optimizer.state[parameter]
            for key, value in moments.items():
                state[key].copy_(value)
            continue
        _set_master(parameter, master.to(parameter.device))
        for key, value in moments.items():
            _set_moment(parameter, value, key)


def _read(
    checkpoint: Checkpoint, name: str, group: str, parameter: nn.Parameter, experts: dict[str, range]
) -> torch.Tensor:
    """What this rank holds of a logical tensor; zeros in a slot without an expert."""
    if name not in experts:
        return checkpoint.full(name, group)
    value_LDF = checkpoint.stacked(name, list(experts[name]), group)
    empty = pieces.full_shape(parameter)[0] - len(value_LDF)
    return F.pad(value_LDF, (0, 0, 0, 0, 0, empty)) if empty else value_LDF


def create_moments(engine: Any) -> None:
    """Zero moments where AdamW would create them at its first step.

    DeepSpeed links a parameter's accessors to its slice of the moments during the first group's first step, when the
    other groups have none yet, and never again; so they must be there before.
    """
    optimizer = torch_optimizer(engine)
    in_groups = _counts_in_groups(optimizer)
    stage = engine.zero_optimization_stage()
    if in_groups:
        for group in optimizer.param_groups:
            group["step"] = 0
    # Stage 3 hands its flat tensors to the optimizer one at a time, during the step alone.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for tensor in flat if stage == 3 else [tensor for group in optimizer.param_groups for tensor in group["params"]]:
        optimizer.state[tensor] = {key: torch.zeros_like(tensor) for key in MOMENTS}
        if not in_groups:
            optimizer.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
