"""The tensors of a public ModuleFormer checkpoint, in the order and with the names of the released files.

Written down by formula, apart from the model classes. A layer is: first norm, the two constant masks (optional), the
attention experts with their router, key and value projections (absent where K = V), second norm, the MLP experts
with theirs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megamf.checkpoint.layout import DTYPES
from megamf.config import ModelConfig

BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(mask|cum_weight)")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: name, shape, dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def public_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of the released files."""
    D, A, F, V = model.n_embd, model.att_hidden, model.ffd_hidden, model.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D)}
    for i in range(model.n_layer):
        at = f"transformer.h.{i}."
        shapes |= {f"{at}ln_1.weight": (D,), f"{at}ln_1.bias": (D,)}
        shapes |= _experts(f"{at}attn.q_proj", model, model.num_experts(i, "attention"), A)
        if not model.shares_kv:
            for name in ("k_proj", "v_proj"):
                shapes |= {f"{at}attn.{name}.weight": (A, D), f"{at}attn.{name}.bias": (A,)}
        shapes |= {f"{at}ln_2.weight": (D,), f"{at}ln_2.bias": (D,)}
        shapes |= _experts(f"{at}mlpf", model, model.num_experts(i, "mlp"), F)
    shapes |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    shapes["lm_head.weight"] = (V, D)
    return shapes


def _experts(at: str, model: ModelConfig, num_experts: int, hidden: int) -> dict[str, tuple[int, ...]]:
    D, G = model.n_embd, model.gating_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.experts.weight": (num_experts, D, hidden),
        f"{at}.output_experts.weight": (num_experts, hidden, D),
    }
    if model.gate_type == "mlp":
        shapes[f"{at}.gate.w_gate.0.weight"] = (G, D)
        shapes[f"{at}.gate.w_gate.0.bias"] = (G,)
        shapes[f"{at}.gate.w_gate.3.weight"] = (num_experts, G)
    elif model.gate_type == "linear":
        shapes[f"{at}.gate.w_gate.0.weight"] = (num_experts, D)
    elif model.gate_type == "tanh":
        shapes[f"{at}.gate.w_gate.0.weight"] = (G, D)
        shapes[f"{at}.gate.w_gate.2.weight"] = (num_experts, G)
    else:
        shapes[f"{at}.gate.expert_centroids"] = (num_experts, G)
        shapes[f"{at}.gate.temperature"] = (1,)
        shapes[f"{at}.gate.w_gate.weight"] = (G, D)
    return shapes


def public_entries(model: ModelConfig, dtypes: Mapping[str, torch.dtype], *, buffers: bool) -> list[Entry]:
    """Every tensor of the public layout with its dtype; `buffers` adds the two constant masks of each layer."""
    side = model.block_size + model.history_length
    entries = []
    for name, shape in public_shapes(model).items():
        entries.append(Entry(name, shape, dtypes[name]))
        if buffers and name.endswith(".ln_1.bias"):
            at = name.removesuffix("ln_1.bias") + "attn."
            entries.append(Entry(f"{at}mask", (side, side), torch.int8))
            entries.append(Entry(f"{at}cum_weight", (side, side), dtypes[name]))
    return entries


def mask_buffer(entry: Entry) -> torch.Tensor:
    """The content of a mask: lower triangle with the diagonal (`mask`) or without it (`cum_weight`)."""
    return torch.ones(entry.shape, dtype=entry.dtype).tril(0 if entry.name.endswith(".mask") else -1)


def plan_shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Cut the tensors, in order, into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.num_bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and so on."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def header(entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, object]]:
    """The order in which a file stores its tensors and the table of its header.

    Falling element size keeps every tensor aligned, as the format asks for.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        table[entry.name] = {
            "dtype": DTYPES[entry.dtype][1],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    return ordered, table
