"""MegaBlocks' grouped GEMM (the package grouped_gemm behind it). It reads the counts on the host: one sync a call.

Importing this module needs megablocks. Shapes: `R` rows grouped by expert, `L` local experts, `D`, `F` widths.
"""

import torch
from megablocks import grouped_gemm_util


def grouped_linear(x_RD: torch.Tensor, w_LDF: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
    """y_RF; autograd by MegaBlocks."""
    return grouped_gemm_util.ops.gmm(x_RD.contiguous(), w_LDF.contiguous(), count_L.cpu())
