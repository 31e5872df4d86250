"""Every kernel for the shapes that the presets use, and what a compiler may make of it: `megamf bench --suite compile`
and the tests compile this list.

Shapes: `B` batch, `T` query time, `K` queries that share a key/value head, `G` key/value heads, `C` channels of a head,
`N` tokens, `D` width, `F` expert width, `L` experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megamf.kernels import grouped_linear, router, stickbreaking
from megamf.kernels.launch import Compiled, Launch, recorded

ARCHITECTURES = (80, 90)
# Shared memory that a block may take, in bytes.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
# Bytes of registers that a thread of an attention kernel may put aside; the others: none. Tiles of half the size spill
# nothing, but pay more for it: the dK/dV pass of 192 and 256 channels would take 16 rows at a time, and on Hopper the
# forward pass of 64 and 128 channels 32 keys, half the width at which its products run at full rate.
ATTENTION_SPILLS = {80: 40, 90: 72}
# (channels, key/value heads): molm-8b-hd128, nano, and what else the rule of tiles tells apart.
HEADS = {64: 8, 128: 8, 192: 1, 256: 4}


@dataclass(frozen=True)
class Case:
    """One kernel for one shape and architecture. `needs`: instructions that the compiled kernel must have."""

    kernel: str
    shape: str
    architecture: int
    launch: Launch
    spill_limit: int = 0
    needs: frozenset[str] = frozenset({"mma"})

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.shape}, sm_{self.architecture}"

    def problem(self, found: Compiled) -> str:
        """What is wrong with the compiled kernel; empty when nothing is."""
        instructions = found.instructions.keys() | ({"mma"} if "wgmma" in found.instructions else set())
        problems = [
            f"spills {found.spills} bytes, the limit is {self.spill_limit}" if found.spills > self.spill_limit else "",
            f"takes {found.shared} bytes of shared memory, a block has {SHARED_LIMIT[self.architecture]}"
            if found.shared > SHARED_LIMIT[self.architecture]
            else "",
            f"has no {' or '.join(sorted(self.needs - instructions))}" if self.needs - instructions else "",
        ]
        return "; ".join(filter(None, problems))


def compile_cases() -> list[Case]:
    """The whole list, in a fixed order. No GPU is asked for anything."""
    return [
        case
        for architecture in ARCHITECTURES
        for part in (attention_cases, grouped_linear_cases, router_cases)
        for case in part(architecture)
    ]


def attention_cases(architecture: int) -> Iterator[Case]:
    """Training in bfloat16 with documents and padding, on Hopper also without; decoding; float32 once."""
    training, decoding = ("forward", "queries", "keys"), ("split", "combine")
    shapes = [(C, True, torch.bfloat16, training + (decoding if C in (64, 256) else ())) for C in HEADS]
    if architecture >= 90:
        shapes += [(C, False, torch.bfloat16, training) for C in (64, 128)]
    else:
        shapes += [(64, True, torch.float32, training + decoding)]
    for C, limited, dtype, names in shapes:
        shape = f"C {C}, {'documents and padding' if limited else 'plain'}, {str(dtype).removeprefix('torch.')}"
        launches = attention_launches(C, limited, architecture, dtype)
        for name in names:
            needs = set() if name == "combine" else {"mma"}
            if name in training and architecture >= 90 and C <= 128:
                needs = {"wgmma"}
            if name in training and dtype == torch.bfloat16:
                needs |= {"cp.async"}  # loads run ahead of the products
            limit = ATTENTION_SPILLS[architecture]
            yield Case(f"attention {name}", shape, architecture, launches[name], limit, frozenset(needs))


def attention_launches(C: int, limited: bool, architecture: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The launches of a training step and of decoding: B 4, T 4096, two queries a key/value head, a model's layout."""
    B, T, K, G = 4, 4096, 2, HEADS[C]

    q = _empty(B, T, K, G, C, dtype=dtype).view(B, T, K * G, C).transpose(1, 2)
    k, v = (_empty(B, T, G, C, dtype=dtype).transpose(1, 2) for _ in range(2))
    start = _empty(B, T, dtype=torch.int32) if limited else None
    mask = _empty(B, T, dtype=torch.uint8) if limited else None
    p = stickbreaking.problem(q, k, True, start, mask, architecture)
    forward, (o, log_rem, stick, reach) = stickbreaking.forward_launch(p, q, k, v, start, mask, 0.1, 1e-6)
    row_end = _empty(p.lines, -(-T // p.rule.keys.N), dtype=torch.int32)
    grad_log_rem = log_rem if limited else None
    (queries, keys), _ = stickbreaking.backward_launches(
        p, o, grad_log_rem, q, k, v, stick, reach, row_end, start, mask, 0.1
    )
    (split, combine), _ = stickbreaking.decode_launches(p, q[:, :, 0], k, v, start, mask, 0.1, 1e-6)
    return {"forward": forward, "queries": queries, "keys": keys, "split": split, "combine": combine}


def grouped_linear_cases(architecture: int) -> Iterator[Case]:
    """The products of an MLP expert and its gradients, in bfloat16, for 32k tokens."""
    needs = frozenset({"wgmma" if architecture >= 90 else "mma"})
    names = (
        "gather", "gather and scatter", "scatter, gated", "gradient of tokens", "gradient of rows, gated",
        "gradient of weights", "gradient of weights, gated",
    )  # fmt: skip
    rows, weights = grouped_linear.rows_times_experts, grouped_linear.rows_to_weights
    for D, F, L in ((1024, 2048, 32), (192, 384, 8)):
        N, K, R = 32768, 2, 65536
        x_ND, h_RF, w1_LDF, w2_LFD = (_empty(*shape) for shape in ((N, D), (R, F), (L, D, F), (L, F, D)))
        count_L, gate_NK = _empty(L, dtype=torch.int64), _empty(N, K, dtype=torch.float32)
        order = {"order_R": _empty(R, dtype=torch.int64)}
        gated = order | {"gate_R": gate_NK}
        with recorded() as launches:
            rows(x_ND, w1_LDF, count_L, **order, num_rows=R, in_fan=K)
            rows(x_ND, w1_LDF, count_L, **order, num_rows=R, in_fan=K, out_fan=1)
            rows(h_RF, w2_LFD, count_L, **gated, num_rows=R, out_fan=1)
            rows(h_RF, w1_LDF.mT, count_L, **order, num_rows=R, out_fan=1)
            rows(x_ND, w2_LFD.mT, count_L, **gated, match=h_RF, num_rows=R, in_fan=K)
            weights(x_ND, h_RF, count_L, **order, x_fan=K)
            weights(h_RF, x_ND, count_L, **gated, g_fan=K)
        for name, job in zip(names, launches, strict=True):
            yield Case(f"experts {name}", f"{L} of {D}-{F}, bfloat16", architecture, job, needs=needs)


def router_cases(architecture: int) -> Iterator[Case]:
    """The fused router and its gradient, for 32k tokens."""
    for G, E, K in ((256, 32, 2), (1024, 32, 2), (64, 8, 2)):
        h_NG, a_EG = _empty(32768, G), _empty(E, G)
        with recorded() as launches:
            expert_NK, gate_NK, prob_E, entropy, lse2, _, logits_NE, lse_N = router.route_forward(h_NG, a_EG, K)
            router.route_backward(gate_NK, prob_E, entropy, lse2, h_NG, a_EG, expert_NK, logits_NE, lse_N)
        for name, job in zip(("forward", "gradient of logits", "gradient of gates"), launches, strict=True):
            yield Case(f"router {name}", f"{E} experts, width {G}, top-{K}, bfloat16", architecture, job)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
