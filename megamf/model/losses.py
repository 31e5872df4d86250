"""Cross entropy in chunks, and the losses that shape the load of the modules.

Shapes: N tokens, D width, V vocabulary, M routers (two a layer), E experts (padded to the largest router).

Balance losses are functions of sums over a batch. `Packed` holds these sums for every router; a loss is evaluated at
the sums of the whole scope (all ranks, all accumulation steps) while its gradient flows through the local share only:
adding up the gradients of all shares gives exactly the gradient on the global batch.
Sources: ModuleFormer's gate (mi, switch + z), its paper (concentration, routing regularisation).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megamf.config.run import Losses
from megamf.model.router import RouterStats, promote

IGNORED = -100


def cross_entropy_sum(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Sum of -log p(label) over labels that are not -100, in float32 or better; scalar.

    Only `chunk` rows of logits are in memory at a time: they are computed again in the backward pass.
    """
    total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    single = hidden_ND.shape[0] <= chunk
    for hidden, label in zip(hidden_ND.split(chunk), label_N.split(chunk)):
        if single or not torch.is_grad_enabled():
            total = total + _chunk_loss(hidden, weight_VD, label)
        else:
            total = total + checkpoint(_chunk_loss, hidden, weight_VD, label, use_reentrant=False)
    return total


def _chunk_loss(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, label_N, ignore_index=IGNORED, reduction="sum")


@dataclass
class Packed:
    """Sums over tokens of every router. prob_ME, count_ME; entropy_M, logsumexp2_M; tokens (scalar); num_experts_M."""

    prob_ME: torch.Tensor
    count_ME: torch.Tensor
    entropy_M: torch.Tensor
    logsumexp2_M: torch.Tensor
    tokens: torch.Tensor
    num_experts_M: torch.Tensor

    def flat(self) -> torch.Tensor:
        """Everything that adds up over ranks, detached, as one vector: one all-reduce serves all routers."""
        parts = [self.prob_ME, self.count_ME, self.entropy_M, self.logsumexp2_M, self.tokens]
        return torch.cat([part.detach().reshape(-1) for part in parts])

    def with_flat(self, flat: torch.Tensor) -> "Packed":
        """The same routers with the sums in `flat` (as laid out by `flat()`)."""
        M, E = self.prob_ME.shape
        prob, count, entropy, logsumexp2, tokens = flat.split([M * E, M * E, M, M, 1])
        return Packed(prob.view(M, E), count.view(M, E), entropy, logsumexp2, tokens.view(()), self.num_experts_M)


def pack(stats: Sequence[RouterStats]) -> Packed:
    """The statistics of all routers of one forward pass, padded with zeros to the largest router."""
    largest = max(item.prob_E.numel() for item in stats)

    def rows(items: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([F.pad(item, (0, largest - item.numel())) for item in items])

    return Packed(
        prob_ME=rows([item.prob_E for item in stats]),
        count_ME=rows([item.count_E for item in stats]),
        entropy_M=torch.stack([item.entropy for item in stats]),
        logsumexp2_M=torch.stack([item.logsumexp2 for item in stats]),
        tokens=stats[0].tokens,
        num_experts_M=torch.tensor([item.prob_E.numel() for item in stats], device=stats[0].prob_E.device),
    )


def _share(total: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The value of `total` with the gradient of `local`."""
    return total.detach() + (local - local.detach())


def balance_terms(local: Packed, scope: Packed) -> dict[str, torch.Tensor]:
    """Every balance loss, summed over routers, evaluated at the sums `scope`, differentiable through `local`.

    mi: H(m|x) - H(m). switch: E * sum_e normalise(sum p)_e normalise(count)_e + 0.1 * mean logsumexp^2.
    z: mean logsumexp^2. concentration: H(m).
    """
    tokens = scope.tokens.clamp(min=1)
    mean_ME = _share(scope.prob_ME, local.prob_ME) / tokens
    marginal_M = -(mean_ME * (mean_ME + 1e-8).log()).sum(-1)
    conditional_M = _share(scope.entropy_M, local.entropy_M) / tokens
    z_M = _share(scope.logsumexp2_M, local.logsumexp2_M) / tokens
    prob_ME = mean_ME / mean_ME.sum(-1, keepdim=True).clamp(min=1e-12)
    load_ME = scope.count_ME / scope.count_ME.sum(-1, keepdim=True).clamp(min=1e-12)
    switch_M = scope.num_experts_M * (prob_ME * load_ME).sum(-1) + 0.1 * z_M
    return {
        "mi": (conditional_M - marginal_M).sum(),
        "switch": switch_M.sum(),
        "z": z_M.sum(),
        "concentration": marginal_M.sum(),
    }


def auxiliary_loss(local: Packed, scope: Packed, weights: Losses) -> torch.Tensor:
    """The weighted sum of the balance, z and concentration losses that `weights` asks for; scalar."""
    terms = balance_terms(local, scope)
    total = weights.z_weight * terms["z"] + weights.concentration * terms["concentration"]
    if weights.balance != "none":
        total = total + weights.balance_weight * terms[weights.balance]
    return total


def routing_norm(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squared norms of the routers' expert rows (the paper's routing regularisation); scalar."""
    return torch.stack([promote(matrix).square().sum() for matrix in matrices]).sum()
