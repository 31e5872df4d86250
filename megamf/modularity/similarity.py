"""How alike the modules of a place are, by what they put out for the same tokens: to find duplicates.

Shapes: N tokens, D width, E modules, F expert width.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from megamf.model import ModuleFormer
from megamf.modularity.inputs import module_inputs
from megamf.modularity.places import Place
from megamf.modularity.streamed import bring


@torch.no_grad()
def similarity(
    model: ModuleFormer,
    prefix: str | Path,
    *,
    seq_len: int,
    tokens: int = 1024,
    on_place: Callable[[int, int], None] | None = None,
) -> dict[Place, torch.Tensor]:
    """Place -> cosine similarity [E, E], float32: of all outputs of two modules for the same N tokens, as one vector.

    An MLP module puts out W2 act(W1 x). Of an attention module both maps are compared, its queries for x and its
    output for the values of x, and the smaller similarity counts: a duplicate must both look and answer alike.
    In memory at one time are the outputs of one place, E * N * D numbers, and the inputs of all, N * D for each.
    Raises UserError for data without two tokens.
    """
    inputs = module_inputs(model, prefix, seq_len, tokens)
    found = {}
    for done, place in enumerate(inputs, start=1):
        bring(model, place.layer)
        layer = model.get_submodule(f"transformer.h.{place.layer}")
        x_ND = inputs[place]
        if place.kind == "mlp":
            experts = layer.mlpf
            y_END = [
                experts.activation(x_ND @ first) @ second
                for first, second in zip(experts.experts.weight, experts.output_experts.weight)
            ]
            found[place] = _cosines(y_END)
        else:
            attention = layer.attn
            v_NF = x_ND if attention.v_proj is None else attention.v_proj(x_ND)
            queries = _cosines([x_ND @ weight for weight in attention.q_proj.experts.weight])
            answers = _cosines([v_NF @ weight for weight in attention.q_proj.output_experts.weight])
            found[place] = torch.minimum(queries, answers)
        if on_place is not None:
            on_place(done, len(inputs))
    return found


def closest_pairs(matrix_EE: torch.Tensor, above: float) -> list[tuple[int, int, float]]:
    """(i, j, similarity) with i < j of every pair above a threshold, most alike first."""
    count = len(matrix_EE)
    pairs = [(i, j, float(matrix_EE[i, j])) for i in range(count) for j in range(i + 1, count)]
    return sorted((pair for pair in pairs if pair[2] > above), key=lambda pair: -pair[2])


def _cosines(y_END: list[torch.Tensor]) -> torch.Tensor:
    flat = torch.stack([y.flatten().float() for y in y_END])
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (flat @ flat.t()).clamp(-1, 1).cpu()
