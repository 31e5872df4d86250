"""Stick-breaking attention over two blocks of keys as one: what a sequence split over processes needs.

A block of keys turns into (o, log_rem): the attention output over these keys alone, and the logarithm of what they
leave of the stick. The newer block breaks the stick first; the older one gets what is left. The operation is
associative, so any number of blocks combine pairwise, in any grouping that keeps their order.

Shapes: `B` batch, `H` query heads, `T` query time, `C` channels of a head.
"""

import torch


def combine(
    o_new_BHTC: torch.Tensor, log_rem_new_BHT: torch.Tensor, o_old_BHTC: torch.Tensor, log_rem_old_BHT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o_new + exp(log_rem_new) * o_old, log_rem_new + log_rem_old): attention over the older and the newer keys.

    Each pair is what `stickbreaking_attention(..., return_log_rem=True)` returns for the same queries: `new` for the
    block of keys that holds the queries themselves (or the newer one), `old` with `causal=False` for keys that all lie
    before them. With documents, the start of a query in a block of S keys that begins at position a is
    `(start - a).clamp(0, S)`. Computed in float32 (float64 for float64), o of o_new's dtype. Differentiable.

    Raises ValueError when the shapes do not fit.
    """
    shapes = [tuple(x.shape) for x in (o_new_BHTC, log_rem_new_BHT, o_old_BHTC, log_rem_old_BHT)]
    if o_new_BHTC.dim() < 1 or shapes[0] != shapes[2] or shapes[1] != shapes[0][:-1] or shapes[3] != shapes[1]:
        raise ValueError(f"combine got {shapes}, expected twice [B, H, T, C] and [B, H, T]")
    # One operation promotes to the type of log_rem, and saves its arguments as they are for the backward pass.
    o_BHTC = torch.addcmul(o_new_BHTC, log_rem_new_BHT.exp().unsqueeze(-1), o_old_BHTC)
    return o_BHTC.to(o_new_BHTC.dtype), log_rem_new_BHT + log_rem_old_BHT
