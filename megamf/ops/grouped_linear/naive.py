"""Each expert's rows times its own matrix, the specification: a loop. Any dtype, autograd by torch.

Shapes: `R` rows grouped by expert, `L` local experts, `D` input width, `F` output width.
"""

import torch


def grouped_linear(x_RD: torch.Tensor, w_LDF: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
    """y_RF: the next count_L[e] rows of x times w_LDF[e], for every expert e in order."""
    parts = x_RD.split(count_L.tolist())
    return torch.cat([x @ w_DF for x, w_DF in zip(parts, w_LDF.unbind(), strict=True)])
