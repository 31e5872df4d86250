"""Routers: which experts a token needs, guessed from the layer's input.

Shapes: N tokens, D input width, M neurons, E experts, K chosen experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megamf.compress.moefication.split import mean_rows
from megamf.compress.moefication.statistics import DenseLayer


@dataclass(frozen=True)
class MlpRouter:
    """first_ED and last_EE of A tanh(B x / |x|); `recovered` on held-out tokens after the epoch that was kept."""

    first_ED: torch.Tensor
    last_EE: torch.Tensor
    recovered: float
    epoch: int


def centres(layer: DenseLayer, label_M: torch.Tensor) -> torch.Tensor:
    """Mean of the normalised rows of W1 of every expert, centre_ED float32."""
    rows_MD = F.normalize(layer.gate_DM.t().float(), dim=-1)
    return mean_rows(rows_MD, label_M, int(label_M.max()) + 1)


def truth(h_NM: torch.Tensor, label_M: torch.Tensor) -> torch.Tensor:
    """score_NE: the sum of |activation| of the neurons of every expert."""
    score_NE = h_NM.new_zeros(len(h_NM), int(label_M.max()) + 1)
    return score_NE.index_add_(1, label_M, h_NM.abs())


def recovered(score_NE: torch.Tensor, guess_NE: torch.Tensor, top_k: int) -> float:
    """Share of the activation mass that lies in the top_k experts by `guess`: the mean over tokens that have any."""
    total_N = score_NE.sum(-1)
    found_N = score_NE.gather(1, guess_NE.topk(top_k, dim=-1).indices).sum(-1)
    some = total_N > 0
    return (found_N[some] / total_N[some]).mean().item() if some.any() else 1.0


@torch.enable_grad()
def train_mlp_router(
    x_ND: torch.Tensor,
    score_NE: torch.Tensor,
    centre_ED: torch.Tensor,
    top_k: int,
    *,
    seed: int = 0,
    epochs: int = 30,
    batch: int = 512,
    lr: float = 0.01,
    held_out: float = 0.1,
) -> MlpRouter:
    """A router A tanh(B x / |x|) that predicts the experts' shares of the activation, by binary cross entropy.

    B begins as the centres, A as the identity. Targets are the scores over the largest of the batch. A random tenth
    of the tokens is held out; of all epochs the one is kept whose top_k experts recover most of the activation there
    (the published code keeps the second-best; we see no reason for that).
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x_ND), generator=generator)
    count = max(1, round(held_out * len(x_ND)))
    held, rest = order[:count], order[count:]
    x_ND = F.normalize(x_ND.float(), dim=-1)
    first = centre_ED.float().clone().requires_grad_()
    last = torch.eye(len(centre_ED)).requires_grad_()
    optimizer = torch.optim.Adam([first, last], lr=lr)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x_ND[rows] @ first.t()) @ last.t()

    best: MlpRouter | None = None
    for epoch in range(epochs + 1):
        if epoch:
            shuffled = rest[torch.randperm(len(rest), generator=generator)]
            for rows in shuffled.split(batch):
                target = score_NE[rows] / score_NE[rows].max().clamp(min=torch.finfo(torch.float32).tiny)
                loss = F.binary_cross_entropy_with_logits(logits(rows), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            share = recovered(score_NE[held], logits(held), top_k)
        if best is None or share > best.recovered:
            best = MlpRouter(first.detach().clone(), last.detach().clone(), share, epoch)
    assert best is not None
    return best
