"""Knowing an update before it is made, and not making it: what DeepSpeed's engine does not offer by itself.

Both are to be called after the last backward pass of a step, in place of or before `engine.step()`.
"""

from typing import Any

import torch

from megamf.parallel.mesh import Mesh


def gradient_square(engine: Any, mesh: Mesh) -> torch.Tensor:
    """This rank's part of the squared norm of the global batch's gradient; the sum over all ranks is the whole.

    float64 scalar on the model's device; inf or NaN where a gradient is, or where its float32 norm overflows.
    At ZeRO 0 every rank holds whole gradients (of its own experts), from stage 1 on a partition that is its own.
    """
    dense, expert = [], []
    if engine.zero_optimization_stage() == 0:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                (dense if getattr(parameter, "allreduce", True) else expert).append(parameter.grad)
        return _square(dense, engine.device) / mesh.world + _square(expert, engine.device) / mesh.edp
    return _square(_partitions(engine.optimizer), engine.device)


def _partitions(optimizer: Any) -> list[torch.Tensor]:
    """The averaged gradients whose updates are this rank's."""
    if getattr(optimizer, "cpu_offload", False):
        optimizer._wait_for_offload_copies()
        owners = optimizer.single_partition_of_fp32_groups
    elif getattr(optimizer, "offload_optimizer", False):
        owners = optimizer.fp32_partitioned_groups_flat
    else:
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]
    return [owner.grad for owner in owners if owner.grad is not None]


def _square(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum().to(device)


def skip_update(engine: Any) -> None:
    """In place of the step's last `engine.step()`: gradients are dropped, parameters and moments stay. Collective.

    From ZeRO 1 on the optimizer is led to its own answer to an overflow, which empties every buffer that it fills
    during backward passes; it reads its flag right after the loss scale's update.
    """
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
        engine.micro_steps += 1  # it counts micro batches to tell when a step is whole
        return
    optimizer = engine.optimizer

    def overflowed(has_overflow: bool = False) -> None:
        optimizer.overflow = True

    optimizer._update_scale = overflowed
    try:
        engine.step()
    finally:
        del optimizer._update_scale
    assert optimizer.overflow, "the engine made an update that was to be skipped"
    optimizer.overflow = False
