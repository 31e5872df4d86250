"""The compiled gather and combination into memory that the caller keeps: on a CPU, without a gradient.

Importing this module needs `megamf._C`. `permute_into(x_ND, order_R, inverse_R, top_k, out_RD)` and
`unpermute_into(y_RD, order_R, inverse_R, gate_NK, top_k, out_ND)` fill their last argument with what `permute` and
`unpermute` return; ValueError where it does not fit. Shapes as in naive.py.
"""

import torch

permute_into = torch.ops.megamf.permute_into
unpermute_into = torch.ops.megamf.unpermute_into


@torch.library.register_fake("megamf::permute_into")
def _permute_into_fake(x, order, inverse, top_k, out):
    return None


@torch.library.register_fake("megamf::unpermute_into")
def _unpermute_into_fake(y, order, inverse, gate, top_k, out):
    return None
