"""A feed-forward layer whose neurons are shared out to experts, some of which a token uses. `naive.py` specifies it.

Shapes: `N` tokens, `D` input width, `E` experts, `F` neurons of one expert, `K` chosen experts, `O` output width.
"""

import torch

from megamf.errors import UserError
from megamf.ops import backend as backends
from megamf.ops.expert_ffn import grouped, naive
from megamf.ops.expert_ffn.naive import ACTIVATIONS

__all__ = ["ACTIVATIONS", "expert_ffn"]

IMPLEMENTATIONS = {"csrc": frozenset({"cpu"}), "grouped": frozenset[str](), "naive": frozenset[str]()}
# The compiled kernel works on whole vectors of the widest kind that there is: 64 bytes.
VECTOR_BYTES = 64
COMPILED = backends.has_extension() and hasattr(torch.ops.megamf, "expert_ffn")

if COMPILED:

    @torch.library.register_fake("megamf::expert_ffn")
    def _fake(x, expert, gate, up, out, gate_bias, up_bias, out_bias, weight, activation):
        return x.new_empty(x.shape[0], out.shape[2])


def expert_ffn(
    x_ND: torch.Tensor,
    expert_NK: torch.Tensor,
    gate_EDF: torch.Tensor,
    out_EFO: torch.Tensor,
    *,
    up_EDF: torch.Tensor | None = None,
    gate_bias_EF: torch.Tensor | None = None,
    up_bias_EF: torch.Tensor | None = None,
    out_bias_O: torch.Tensor | None = None,
    weight_NK: torch.Tensor | None = None,
    activation: str = "relu",
    backend: str = "auto",
) -> torch.Tensor:
    """y_NO = b2 + sum over the chosen e of weight * W2_e (act(W1_e x + b1_e) * (U_e x + c_e)); U where it is given.

    All of one floating dtype but expert_NK, int64 in 0..E-1; the experts of a token differ. activation: one of
    ACTIVATIONS. backend: "csrc" is one compiled pass on the CPU without gradients, for float32 and float64 and sizes
    F and O that are multiples of 64 bytes; "grouped" is made of permute, grouped_linear and unpermute, differentiable,
    for any device; "naive" computes everything. "auto" is "csrc" where it can run, "grouped" elsewhere.

    Raises ValueError for shapes, types or activations that do not fit, UserError for a backend that cannot run.
    """
    arguments = (
        x_ND,
        expert_NK,
        gate_EDF,
        up_EDF,
        out_EFO,
        gate_bias_EF,
        up_bias_EF,
        out_bias_O,
        weight_NK,
        activation,
    )
    _check(*arguments)
    floating = [t for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
    problem = _problem(x_ND, gate_EDF, out_EFO, torch.is_grad_enabled() and any(t.requires_grad for t in floating))
    name = backends.choose("expert_ffn", backend, x_ND.device, IMPLEMENTATIONS, "grouped" if problem else "csrc")
    if name == "naive":
        return naive.expert_ffn(*arguments)
    if name == "grouped":
        return grouped.expert_ffn(*arguments)
    if problem:
        raise UserError(f"expert_ffn: backend 'csrc' {problem}; use 'grouped'")
    if not COMPILED:
        raise UserError(f"expert_ffn: megamf._C was built before this operation was there; {backends.HOW_TO_BUILD}")
    return torch.ops.megamf.expert_ffn(*arguments)


def _problem(x_ND: torch.Tensor, gate_EDF: torch.Tensor, out_EFO: torch.Tensor, learns: bool) -> str:
    """Why the compiled kernel cannot run; empty when it can."""
    step = VECTOR_BYTES // x_ND.element_size()
    if x_ND.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {x_ND.device.type}"
    if x_ND.dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, got {x_ND.dtype}"
    if gate_EDF.shape[2] % step or out_EFO.shape[2] % step:
        return f"needs multiples of {step}, got {gate_EDF.shape[2]} neurons an expert and {out_EFO.shape[2]} outputs"
    return "has no gradient" if learns else ""


def _check(x, expert, gate, up, out, gate_bias, up_bias, out_bias, weight, activation) -> None:
    if x.dim() != 2 or gate.dim() != 3 or out.dim() != 3 or expert.dim() != 2 or expert.dtype != torch.int64:
        raise ValueError(
            f"expert_ffn: got x {tuple(x.shape)}, experts {expert.dtype} {tuple(expert.shape)}, gate "
            f"{tuple(gate.shape)} and out {tuple(out.shape)}, expected [N, D], int64 [N, K], [E, D, F] and [E, F, O]"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_ffn: got activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    (N, D), (E, _, size), O = x.shape, gate.shape, out.shape[2]
    if not 1 <= expert.shape[1] <= E:
        raise ValueError(f"expert_ffn: got {expert.shape[1]} experts a token, expected 1 to {E}")
    wanted = {
        "x": (x, (N, D)), "experts": (expert, (N, expert.shape[1])), "gate": (gate, (E, D, size)),
        "up": (up, (E, D, size)), "out": (out, (E, size, O)), "gate_bias": (gate_bias, (E, size)),
        "up_bias": (up_bias, (E, size)), "out_bias": (out_bias, (O,)), "weight": (weight, (N, expert.shape[1])),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tuple(tensor.shape) != shape or (name != "experts" and tensor.dtype != x.dtype)):
            raise ValueError(
                f"expert_ffn: got {name} {tensor.dtype} {tuple(tensor.shape)}, expected {x.dtype} {tuple(shape)}"
            )
