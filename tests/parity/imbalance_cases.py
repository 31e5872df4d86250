"""Uneven work, made on purpose: routers that send tokens to few experts, and batches of every odd kind.

Shapes: B sequences of a global batch, T time.
"""

import torch

from megamf.data.loader import MicroBatch
from megamf.model import ModuleFormer, initialise
from megamf.model.router import Router

MODEL = {
    "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20, "n_att_experts": 4,
    "n_mlp_experts": 8, "k_att": 1, "k_mlp": 2, "gating_size": 8, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
B, T, STEPS = 4, 24, 2

# Logits that are added to those of an expert, whatever the token, for attention and MLP routers.
PULLS = {
    "an_expert_without_tokens": ({2: -30.0}, {5: -30.0}),
    "all_tokens_on_one_expert": ({0: 6.0}, {0: 6.0, 1: 5.0}),
}
SCENARIOS = [*PULLS, "ranks_without_labels", "all_tokens_equal", "one_token_a_sequence", "uneven_documents"]


def make_model(config, scenario: str, seed: int) -> ModuleFormer:
    """The whole model that every layout starts from."""
    model = ModuleFormer(config)
    initialise(model, config, seed)
    attention, mlp = PULLS.get(scenario, ({}, {}))
    routers = [module for module in model.modules() if isinstance(module, Router)]
    with torch.no_grad():
        for router, pulls in zip(routers, [attention, mlp] * config.n_layer, strict=True):
            # One hidden feature that is gelu(1) for every token.
            router.w_gate[0].weight[0] = 0.0
            router.w_gate[0].bias[0] = 1.0
            router.w_gate[-1].weight[:, 0] = 0.0
            for expert, pull in pulls.items():
                router.w_gate[-1].weight[expert, 0] = pull / 0.8413
    return model


def global_batch(scenario: str, step: int) -> MicroBatch:
    """All B sequences of a step."""
    generator = torch.Generator().manual_seed(step)
    time = 1 if scenario == "one_token_a_sequence" else T
    token_BT = torch.randint(61, (B, time + 1), generator=generator)
    if scenario == "all_tokens_equal":
        token_BT = torch.full_like(token_BT, 7)
    input_BT, label_BT = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()
    if scenario == "ranks_without_labels":
        label_BT[: B // 2] = -100
    start_BT = None
    if scenario == "uneven_documents":
        position_T = torch.arange(time)
        rows = [0 * position_T, position_T, position_T // 5 * 5, torch.where(position_T < 3, 0, 3)]
        start_BT = torch.stack(rows).to(torch.int32)
    return MicroBatch(input_BT, label_BT, start_BT)


def share(batch: MicroBatch, rank: int, world: int) -> MicroBatch:
    """The sequences of one rank."""
    rows = slice(rank * B // world, (rank + 1) * B // world)
    return MicroBatch(
        batch.input_BT[rows], batch.label_BT[rows], None if batch.start_BT is None else batch.start_BT[rows]
    )
