"""ZeRO 3: parameters that live in pieces, one on each rank of a group, and are whole only while they are used.

A dense parameter is cut over all ranks, an expert tensor over the ranks that replicate this rank's share of the
experts (`mesh.edp_group`). DeepSpeed cuts each parameter over a group of its own where the parameter says so; it does
this for its own AutoEP layers, by attributes that `declare_expert` sets on ours.
"""

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import nn

from megamf.config import ModelConfig
from megamf.model.init import expert_indices, initial_value
from megamf.model.router import Router
from megamf.parallel.mesh import Mesh


def in_pieces(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has cut this parameter up."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, wherever its pieces are."""
    return parameter.ds_shape if in_pieces(parameter) else parameter.shape


def fill_in_pieces(model: nn.Module, config: ModelConfig, seed: int, mesh: Mesh, filled: dict[str, Any]) -> None:
    """Give a model on the meta device its initial weights; no rank ever holds more than one whole parameter.

    The values are those of `initialise`, in the precision that `filled` (DeepSpeed's configuration) asks for.
    Collective.
    """
    dtype = torch.bfloat16 if filled["bf16"]["enabled"] else torch.float32
    experts = expert_indices(model)
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            value = initial_value(full_name, parameter.shape, config, seed, experts.get(full_name))
            fresh = nn.Parameter(value.to(dtype))
            if full_name in experts and mesh.ep > 1:
                declare_expert(fresh, mesh)
            # A module of its own: DeepSpeed cuts up all parameters of what it is given.
            holder = nn.Module()
            holder.parameter = fresh
            deepspeed.zero.Init(module=holder, config_dict_or_path=filled, dtype=dtype)
            setattr(module, name, fresh)


def declare_expert(parameter: nn.Parameter, mesh: Mesh) -> None:
    """Have DeepSpeed cut this parameter over its replicas, and average its gradient as that of the global batch."""
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = mesh.group_name
    parameter.ds_zero_partition_process_group = mesh.edp_group


def declare_uses(objective: nn.Module) -> None:
    """Tell DeepSpeed which parameters are used by the call of another module than their own."""
    measured = getattr(objective, "measured", [])
    for module in objective.modules():
        if isinstance(module, Router):
            deepspeed.zero.register_external_parameter(module, module.expert_rows())
            if module in measured:
                deepspeed.zero.register_external_parameter(objective, module.expert_rows())


def gather_in_one_order(parameters: Iterable[nn.Parameter]) -> None:
    """Have the gathers of one call start in the same order on every rank.

    DeepSpeed hands over a set, whose order differs between processes, and starts one collective for each group of
    ranks in it; with two groups, ranks that start them in different orders may wait for each other for ever.
    """

    def ordered(gather: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, **options: gather(sorted(params, key=lambda parameter: parameter.ds_id), **options)

    for parameter in parameters:
        parameter.all_gather_coalesced = ordered(parameter.all_gather_coalesced)


def gathered(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of the whole parameter. Collective over the ranks that hold its pieces."""
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write the whole parameter. Collective over the ranks that hold its pieces, with one value on all of them."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.detach().copy_(value)


def set_master(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write this rank's piece of the optimizer's fp32 copy, given the whole."""
    safe_set_local_fp32_param(parameter, _piece(parameter, value))


def set_moment(parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
    """Write this rank's piece of a moment, given the whole."""
    safe_set_local_optimizer_state(parameter, _piece(parameter, value), key)


def _piece(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's piece of `value`, padded with zeros to the length that all pieces have."""
    length = parameter.ds_tensor.numel()
    start = length * dist.get_rank(parameter.ds_process_group)
    own = value.reshape(-1)[start : start + length]
    piece = own.new_zeros(length)
    piece[: own.numel()] = own
    return piece
