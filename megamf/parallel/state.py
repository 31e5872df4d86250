"""Training state of a DeepSpeed engine as logical tensors: out for a checkpoint, in from one, for any layout.

Shapes: L local experts, E experts, G router width. Names are `GROUP/NAME` with the groups of `megamf.checkpoint`; an
expert tensor [L, in, out] leaves as one tensor [in, out] for every expert. Parameters that are not trained have weights
and no more; what is trained of a tensor in part leaves under the name of the whole. Everything goes through DeepSpeed's
per-parameter accessors, one parameter at a time; at stage 0 the state is the torch optimizer's own, at stage 3 the
weights are gathered too.
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
from megamf.model.tuning import Part, logical_parts
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
    parts = logical_parts(model)
    matrices: dict[str, list[tuple[Part, dict[str, torch.Tensor]]]] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        part = parts[name]
        if part.rows is not None:
            matrices.setdefault(part.key, []).append((part, dict(_parameter_state(engine, parameter))))
            continue
        for group, tensor in _parameter_state(engine, parameter):
            if part.experts is not None:
                for local, expert in enumerate(part.experts):
                    if expert % mesh.edp == mesh.edp_rank:
                        yield f"{group}/{part.key}.{expert}", tensor[local]
            elif index % mesh.world == mesh.rank:
                yield f"{group}/{part.key}", tensor
    for index, (key, pair) in enumerate(matrices.items()):
        if index % mesh.world == mesh.rank:
            yield from ((f"{group}/{key}", tensor) for group, tensor in _joined(pair).items())


def _joined(pair: list[tuple[Part, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Group -> a router matrix [E, G] from its frozen and its trained rows. A frozen row's moments are zero."""
    joined = {}
    for group in max((found for _, found in pair), key=len):
        rows = []
        for _, found in sorted(pair, key=lambda item: item[0].rows.start):
            weights = found["weights"].float()
            rows.append(found.get(group, weights if group == "master" else torch.zeros_like(weights)))
        joined[group] = torch.cat(rows)
    return joined


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
    parts = logical_parts(model)
    found = {}
    for name, parameter in model.named_parameters():
        share = get(parameter).detach().float().reshape(pieces.full_shape(parameter)).contiguous()
        if parts[name].experts is not None and mesh.ep > 1:
            shares = [torch.empty_like(share) for _ in range(mesh.ep)]
            dist.all_gather(shares, share, group=mesh.ep_group)
            count = len(parts[name].everywhere)
            sizes = [len(share_of_experts(count, rank, mesh.ep)) for rank in range(mesh.ep)]
            share = torch.cat([part[:size] for part, size in zip(shares, sizes)])
        found[name] = share.cpu().clone()
    return found


def global_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """State-dict key -> shape of the whole logical tensor (all experts), whatever share this rank holds."""
    parts = logical_parts(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        part, shape = parts[name], pieces.full_shape(parameter)
        own = part.everywhere or part.rows
        length = (shape[0] if own is None else len(own)) + shapes.get(part.key, (0,))[0]
        shapes[part.key] = (length, *shape[1:])
    return shapes


def expected_names(engine: Any) -> set[str]:
    """The names that all ranks together write."""
    model = engine.module.model
    parts = logical_parts(model)
    names = set()
    for name, parameter in model.named_parameters():
        part, groups = parts[name], ["weights"]
        if parameter.requires_grad:
            groups += [*MOMENTS] + (["master"] if parameter.dtype != torch.float32 else [])
        suffixes = [""] if part.everywhere is None else [f".{expert}" for expert in part.everywhere]
        names.update(f"{group}/{part.key}{suffix}" for group in groups for suffix in suffixes)
    return names


def refresh_masters(engine: Any) -> None:
    """After the weights were changed from outside: the optimizer's fp32 copies follow them."""
    if engine.zero_optimization_stage() > 0:
        for parameter in engine.module.model.parameters():
            if parameter.requires_grad:
                _set_master(parameter, _weights(parameter).float())


def _parameter_state(engine: Any, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weights", _weights(parameter)
    if not parameter.requires_grad:
        return
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
    """Fill the parameters of a model (a rank's share of it) with the best precision the checkpoint has.

    Adapters that the checkpoint does not have stay as they are.
    """
    parts = logical_parts(model)
    stored = checkpoint.logical_shapes()
    for name, parameter in model.named_parameters():
        if parts[name].adapter and parts[name].key not in stored:
            continue
        group = "master" if _stored(checkpoint, parts[name], "master") else "weights"
        _set_weights(parameter, _read(checkpoint, parts[name], group, parameter))


@torch.no_grad()
def load_state(engine: Any, checkpoint: Checkpoint, step: int) -> None:
    """Fill weights, masters and moments from a checkpoint written by any layout; AdamW's count becomes `step`."""
    model = engine.module.model
    parts = logical_parts(model)
    optimizer = torch_optimizer(engine)
    if _counts_in_groups(optimizer):
        for group in optimizer.param_groups:
            group["step"] = step
    else:
        for state in optimizer.state.values():
            state["step"].fill_(step)
    for name, parameter in model.named_parameters():
        part = parts[name]
        weights = _read(checkpoint, part, "weights", parameter)
        has_master = _stored(checkpoint, part, "master")
        master = _read(checkpoint, part, "master", parameter) if has_master else weights.float()
        # A run that changes its precision continues from the better copy.
        _set_weights(parameter, weights if parameter.dtype == weights.dtype else master)
        if not parameter.requires_grad:
            continue
        moments = {key: _read(checkpoint, part, key, parameter).to(parameter.device) for key in MOMENTS}
        if engine.zero_optimization_stage() == 0:
            state = engine.optimizer.state[parameter]
            for key, value in moments.items():
                state[key].copy_(value)
            continue
        _set_master(parameter, master.to(parameter.device))
        for key, value in moments.items():
            _set_moment(parameter, value, key)


def missing_state(engine: Any, checkpoint: Checkpoint) -> list[str]:
    """Names of moments that this run has and the checkpoint, of a run that trained less, has not; sorted."""
    moments = {name for name in expected_names(engine) if name.split("/")[0] in MOMENTS}
    return sorted(moments - checkpoint.manifest.tensors.keys())


def _stored(checkpoint: Checkpoint, part: Part, group: str) -> bool:
    if part.experts is None:
        return checkpoint.has(part.key, group)
    return all(checkpoint.has(f"{part.key}.{expert}", group) for expert in part.experts)


def _read(checkpoint: Checkpoint, part: Part, group: str, parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a logical tensor; zeros in a slot without an expert."""
    if part.experts is None:
        value = checkpoint.full(part.key, group)
        return value if part.rows is None else value[part.rows.start : part.rows.stop]
    value_LDF = checkpoint.stacked(part.key, list(part.experts), group)
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
