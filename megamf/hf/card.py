"""The model card of an export: what is known of the model, and how to load it."""

from typing import Any

from megamf.config import ModelConfig
from megamf.hf.folder import parameter_shapes
from megamf.hf.tokenizer import TokenizerReport

SPARSE = """A ModuleFormer language model: sparse stick-breaking attention and sparse feed-forward layers, without
positional encoding, written by megamf."""
NEOX = "A GPT-NeoX language model, dense, with softmax attention and rotary positions, written by megamf."
REMOTE_CODE = """
`trust_remote_code` runs the two Python files of this folder, which need torch and transformers 5 only. With megamf
installed, `import megamf.hf` takes their place and is faster.
"""


def model_card(
    name: str, model: ModelConfig, state: dict[str, Any], dtype: str, tokenizer: TokenizerReport | None
) -> str:
    """Markdown with the YAML head that model hubs read. Only facts found in the checkpoint are stated."""
    total, active = parameter_counts(model)
    rows = [
        ("parameters", f"{total:,} ({active:,} used by a token)" if model.sparse else f"{total:,}"),
        ("layers, width", f"{model.n_layer}, {model.n_embd}"),
        *(_of_experts(model) if model.sparse else _of_neox(model)),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("weights", dtype),
        *_training(state),
    ]
    if tokenizer is not None:
        rows.append(("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids; {tokenizer.sentence()}"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    loading = 'tokenizer = AutoTokenizer.from_pretrained(".")\n' if tokenizer is not None else ""
    classes = "AutoModelForCausalLM, AutoTokenizer" if tokenizer is not None else "AutoModelForCausalLM"
    tags = "- moduleformer\n- mixture-of-experts" if model.sparse else "- gpt_neox"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

{SPARSE if model.sparse else NEOX} No evaluation of its quality, its biases or its safety comes with this folder.

| | |
|---|---|
{table}

```python
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained("."{", trust_remote_code=True" if model.sparse else ""})
{loading}```
{REMOTE_CODE if model.sparse else ""}"""


def parameter_counts(model: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that one token uses (k of the experts; the embedding counts as a whole)."""
    total = active = 0
    for name, shape in parameter_shapes(model).items():
        count = 1
        for size in shape:
            count *= size
        total += count
        if len(shape) == 3:
            count = count // shape[0] * (model.k_mlp if ".mlpf." in name else model.k_att)
        active += count
    return total, active


def _training(state: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if tokens := state.get("consumed_tokens"):
        rows.append(("training", f"{state['step']:,} steps, {tokens:,} tokens"))
    train = state.get("config", {}).get("train", {})
    if "seq_len" in train:
        rows.append(("training sequences", f"{train['seq_len']:,} tokens"))
    if origin := state.get("origin"):
        rows.append(("origin", f"{origin['name']} ({origin['format']})"))
    return rows


def _of_experts(model: ModelConfig) -> list[tuple[str, str]]:
    heads = f"{model.n_head} x {model.head_dim} each"
    router = f"{model.gate_type}, width {model.gating_size}" if model.gate_type != "linear" else "linear"
    return [
        ("attention experts", f"{_numbers(model, 'attention')}, {model.k_att} a token, {heads}"),
        ("MLP experts", f"{_numbers(model, 'mlp')}, {model.k_mlp} a token, hidden width {model.ffd_hidden}"),
        ("router", router),
    ]


def _of_neox(model: ModelConfig) -> list[tuple[str, str]]:
    residual = "beside" if model.parallel_residual else "before"
    return [
        ("attention", f"{model.n_head} heads of {model.head_dim}, {model.rotary_channels} channels of each rotary"),
        ("MLP", f"hidden width {model.ffd_hidden}, attention {residual} it"),
        ("context", f"{model.block_size:,} tokens"),
    ]


def _numbers(model: ModelConfig, kind: str) -> str:
    """`16`, or `9 to 16` where layers differ."""
    numbers = [model.num_experts(layer, kind) for layer in range(model.n_layer)]
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
