"""Which implementations a model computes with, by name."""

from dataclasses import dataclass

from torch import nn

from megamf.apex import fused_layer_norm
from megamf.config import RunConfig
from megamf.errors import UserError
from megamf.ops.backend import package_problem


@dataclass(frozen=True)
class Backends:
    """experts: auto | torch | triton | megablocks | loop. attention: auto | csrc | triton | naive. norm: torch | apex.

    Raises UserError when a package that a choice needs is not installed, and says how to get it.
    """

    experts: str = "auto"
    attention: str = "auto"
    norm: str = "torch"

    def __post_init__(self) -> None:
        for name in ("experts", "attention"):
            if problem := package_problem(getattr(self, name)):
                raise UserError(f"{name}.backend={getattr(self, name)} {problem}")
        if self.norm == "apex":
            fused_layer_norm()

    @classmethod
    def of(cls, config: RunConfig) -> "Backends":
        """The choices of a run configuration."""
        return cls(config.experts.backend, config.attention.backend, config.norm.backend)

    def layer_norm(self, width: int, eps: float) -> nn.Module:
        """A layer norm over the last axis, with the parameters `weight` and `bias`."""
        return fused_layer_norm()(width, eps=eps) if self.norm == "apex" else nn.LayerNorm(width, eps=eps)


AUTOMATIC = Backends()
