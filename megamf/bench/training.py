"""One training step as a function, for the suites that time it.

Shapes: B batch, T time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megamf.config import ModelConfig, RunConfig
from megamf.config.run import Losses, Optim
from megamf.model import ModuleFormer, initialise
from megamf.model.losses import auxiliary_loss
from megamf.model.objective import Objective
from megamf.ops.stickbreaking import DEFAULT_STOP


def training_step(
    model_config: ModelConfig,
    B: int,
    T: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> Callable[[], object]:
    """One whole update (forward, backward, AdamW) on random tokens, as a function without arguments.

    A `dtype` below float32 trains as mixed precision does: the model and its gradients in `dtype`, the optimizer on
    float32 master weights. recompute: expert activations are computed again in the backward pass.
    """
    config = RunConfig(model=model_config, losses=Losses(balance="mi"), optim=Optim())
    with torch.device(device):
        model = ModuleFormer(model_config)
    initialise(model, model_config, seed=0)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute
    objective = Objective(model, config.train.loss_chunk)
    parameters = list(model.parameters())
    masters = parameters if dtype == torch.float32 else [p.detach().float().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=config.optim.lr, fused=True)
    token_BT = torch.randint(model_config.vocab_size, (B, T + 1), device=device)
    input_BT, label_BT = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()

    def step() -> None:
        loss_sum, sums, _ = objective(input_BT, label_BT, None)
        (loss_sum / (B * T) + auxiliary_loss(sums, sums, config.losses)).backward()
        if masters is parameters:
            optimizer.step()
        else:
            update_masters(optimizer, parameters, masters)
        for parameter in parameters:
            parameter.grad = None

    return step


def update_masters(
    optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], masters: list[torch.Tensor]
) -> None:
    """The gradients of `parameters` step the float32 `masters`, whose values go back."""
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
            master.grad = None


@contextmanager
def every_key() -> Iterator[None]:
    """Within it, no attention that leaves `stop` to the default stops early."""
    usual = dict(DEFAULT_STOP)
    DEFAULT_STOP.update(dict.fromkeys(usual, 0.0))
    try:
        yield
    finally:
        DEFAULT_STOP.update(usual)
