"""Mixture of adaptations: a frozen model with M copies of an adapter or a LoRA in every layer.

Source: AdaMix (arXiv 2205.12410). `prepare` puts the copies into a model, `route` says which of them serve the next
forward pass, `megamf.adapt.mixture.merge` averages them into one.

What PEFT carries. For LoRA everything but the copies: PEFT finds the layers, wraps them, trains and saves the task
head, and writes and reads the merged result. Each of its two projections is then replaced by a `Mixture`, which looks
to PEFT like the one linear map it had. PEFT's own several named adapters do not fit: one name stands for both
projections, so that independent draws would need M x M names, and choosing a name marks every other one as not
trained, the shared projection with it. The expert tensors of a ModuleFormer (attention and MLP experts, [expert, in,
out]) go the same way, through PEFT's `target_parameters`; there PEFT's A stands at the output and B at the input.
PEFT has no bottleneck adapter, so those, and their files, are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from megamf.adapt.mixture import MODES, Mixture, Pair, choose, choose_average, choose_fixed, draw, mixture_of
from megamf.errors import UserError

METHODS = ("lora", "adapter", "full")
SHARES = ("up", "down", "none")
STARTS = ("same", "own")

# Where bottleneck adapters stand: behind the feed-forward layer of each block, before the residual sum.
PLACES = {
    "bert": r"encoder\.layer\.\d+\.output\.dense",
    "roberta": r"encoder\.layer\.\d+\.output\.dense",
    "xlm-roberta": r"encoder\.layer\.\d+\.output\.dense",
    "distilbert": r"transformer\.layer\.\d+\.ffn",
    "gpt2": r"h\.\d+\.mlp",
    "gpt_neox": r"layers\.\d+\.mlp",
    "llama": r"layers\.\d+\.mlp",
    "mistral": r"layers\.\d+\.mlp",
    "qwen2": r"layers\.\d+\.mlp",
    "qwen3": r"layers\.\d+\.mlp",
    "moduleformer": r"h\.\d+\.mlpf",
}
# PEFT knows where LoRA stands for the usual models; not for this one.
EXPERTS = ("attn.q_proj.experts.weight", "attn.q_proj.output_experts.weight")


@dataclass(frozen=True)
class AdamixConfig:
    """What is put into the model.

    method: `lora`, `adapter` (bottleneck) or `full` (no modules: everything is trained). modules: M, copies in every
    layer. rank: of LoRA, or the bottleneck's width. alpha: LoRA's outputs are multiplied by alpha / rank. dropout: on
    LoRA's inputs. share: the projection that has one copy only. start: all copies alike, or each with values of its
    own (None: as in the release, `same` for LoRA and `own` for adapters). targets, target_parameters: where LoRA
    stands, as PEFT understands them; places: a regular expression for the end of the names of the modules behind
    which adapters stand. None or empty: what is usual for the model.
    Raises UserError for values that contradict each other.
    """

    method: str = "lora"
    modules: int = 4
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    share: str = "up"
    start: str | None = None
    targets: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    places: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("share", self.share, SHARES)):
            if value not in known:
                raise UserError(f"{name}={value!r} is not one of {', '.join(known)}")
        if self.start is not None and self.start not in STARTS:
            raise UserError(f"start={self.start!r} is not one of {', '.join(STARTS)}")
        if self.modules < 1:
            raise UserError(f"modules={self.modules}: a mixture has at least 1 module")
        if self.rank < 1:
            raise UserError(f"rank={self.rank}: the width between the projections is at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is outside 0 <= dropout < 1")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha={self.alpha} is not above zero")
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        lora_only = {
            "alpha": self.alpha is not None,
            "dropout": self.dropout > 0,
            "targets": bool(self.targets),
            "target_parameters": bool(self.target_parameters),
        }
        for name, given in lora_only.items():
            if given and self.method != "lora":
                raise UserError(f"{name} is LoRA's and has no effect with method={self.method!r}: leave it out")
        if self.places is not None and self.method != "adapter":
            raise UserError(f"places are those of adapters and have no effect with method={self.method!r}: leave them")
        if self.method == "full" and (self.modules != 1 or self.start is not None):
            raise UserError(f"method='full' trains the model itself: modules={self.modules} must be 1, and no start")
        if self.start is not None and self.modules == 1:
            raise UserError(f"start={self.start!r} has no effect with modules=1: leave it out")
        if self.start == "own" and self.method == "lora" and self.share == "down":
            raise UserError("start='own' has no effect with share='down': B is zero in every copy of a LoRA")
        if self.dropout and self.target_parameters:
            raise UserError(f"dropout={self.dropout} cannot act on target_parameters (a limit of PEFT): make it 0")

    @property
    def scaled_alpha(self) -> float:
        """alpha, or what stands for None: twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def copies_start(self) -> str:
        """start, or what the method's release did."""
        return self.start or ("same" if self.method == "lora" else "own")


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))), both projections with bias."""

    def __init__(self, width: int, rank: int, config: AdamixConfig, dtype: torch.dtype, std: float = 0.02) -> None:
        super().__init__()

        def reset(one: nn.Linear) -> None:
            nn.init.normal_(one.weight, std=std)
            nn.init.zeros_(one.bias)

        sides = []
        for name, sizes in (("down", (width, rank)), ("up", (rank, width))):
            first = nn.Linear(*sizes, dtype=dtype)
            reset(first)
            copies = 1 if config.share == name else config.modules
            sides.append(mixture_of(first, copies, reset if config.copies_start == "own" else None))
        self.down, self.up = sides

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width], computed in the adapter's dtype and returned in that of h."""
        x = h.to(self.down.weight.dtype)
        return (x + self.up(F.gelu(self.down(x)))).to(h.dtype)


def prepare(model: PreTrainedModel, config: AdamixConfig, task: str) -> nn.Module:
    """Freeze the model and put the copies into it; the task head (classification, regression) stays trainable.

    Returns a peft.PeftModel for LoRA, else the same model. Initial values are drawn from torch's global generator.
    Raises UserError where the model has no usual place for the modules, or the named places do not exist.
    """
    if config.method == "full":
        return model
    if config.method == "adapter":
        return _with_adapters(model, config, task)
    return _with_lora(model, config, task)


def pairs_of(model: nn.Module) -> list[Pair]:
    """All adaptation modules of a prepared model, in the order of the model."""
    pairs = []
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck) and isinstance(module.down, Mixture):
            pairs.append(Pair(name, module.down, module.up))
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and "default" in module.lora_A:
            down, up = module.lora_A["default"], module.lora_B["default"]
            if isinstance(down, Mixture):
                pairs.append(Pair(name, down, up))
    return pairs


def route(pairs: list[Pair], mode: str, *, index: int = 0, seed: int = 0, step: int = 0, number: int = 0) -> None:
    """Which copies serve the next forward pass.

    merged: the average. fixed: copy `index` everywhere. random: a draw from (seed, step, number), each side of each
    pair by itself. Raises UserError for another mode, or an index that no copy has.
    """
    if not pairs:
        return
    copies = max(max(len(pair.down), len(pair.up)) for pair in pairs)
    if mode == "merged":
        choose_average(pairs)
    elif mode == "fixed":
        if not 0 <= index < copies:
            raise UserError(f"copy {index} does not exist: there are {copies}, counted from 0")
        choose_fixed(pairs, index)
    elif mode == "random":
        choose(pairs, draw(seed, step, number, len(pairs), copies))
    else:
        raise UserError(f"mode {mode!r} is not one of {', '.join(MODES)}")


def head_names(model: PreTrainedModel, task: str) -> list[str]:
    """The modules outside of the pretrained body that have parameters: the task head. None for generation."""
    if task == "generation":
        return []
    outside = [(name, part) for name, part in model.named_children() if name != model.base_model_prefix]
    return [name for name, part in outside if any(True for _ in part.parameters())]


def count(model: nn.Module, head: Sequence[str] = ()) -> dict[str, int]:
    """Numbers of parameters: `trained` (all copies and the head), `head`, and `merged`: those of the modules once
    their copies are averaged, which is what the adapted model costs more than the base."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_copies = merged = 0
    for pair in pairs_of(model):
        for side in (pair.down, pair.up):
            sizes = sum(p.numel() for p in side.parameters())
            in_copies += sizes
            merged += sizes // len(side)
    if not pairs_of(model):
        return {"trained": trained, "head": 0, "merged": 0}
    return {"trained": trained, "head": trained - in_copies, "merged": merged}


def _with_adapters(model: PreTrainedModel, config: AdamixConfig, task: str) -> nn.Module:
    kind = model.config.model_type
    pattern = config.places or PLACES.get(kind)
    if pattern is None:
        raise UserError(
            f"where adapters stand in a {kind!r} is not known (known: {', '.join(PLACES)}): name the modules behind "
            "which they shall stand by --places, a regular expression for the end of their names"
        )
    try:
        matcher = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise UserError(f"places={pattern!r} is not a regular expression: {error}") from None
    places = [name for name, _ in model.named_modules() if matcher.fullmatch(name)]
    if not places:
        raise UserError(f"no module of this {kind!r} has a name that ends with {pattern!r}")
    hidden = model.config.get_text_config().hidden_size
    head = head_names(model, task)
    model.requires_grad_(False)
    for name in places:
        module = model.get_submodule(name)
        own = next(module.parameters())
        width = getattr(module, "out_features", hidden)
        adapter = Bottleneck(width, config.rank, config, torch.promote_types(own.dtype, torch.float32))
        module.add_module("bottleneck", adapter.to(own.device))
        module.register_forward_hook(_through_adapter)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    return model


def _through_adapter(module: nn.Module, _: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    """Layers of some models return more than the hidden state; that comes first."""
    if isinstance(output, tuple):
        return (module.bottleneck(output[0]), *output[1:])
    return module.bottleneck(output)


def _with_lora(model: PreTrainedModel, config: AdamixConfig, task: str) -> nn.Module:
    import peft

    targets, parameters = list(config.targets) or None, list(config.target_parameters)
    if targets is None and not parameters and model.config.model_type == "moduleformer":
        parameters = list(EXPERTS)
        targets = ["k_proj", "v_proj"] if not model.config.shares_kv else []
    if parameters and config.dropout:
        raise UserError(f"dropout={config.dropout} cannot act on expert tensors (a limit of PEFT): make it 0")
    if parameters and targets is None:
        targets = []
    try:
        peft_config = peft.LoraConfig(
            task_type="CAUSAL_LM" if task == "generation" else "SEQ_CLS",
            r=config.rank,
            lora_alpha=config.scaled_alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            target_parameters=parameters or None,
            modules_to_save=head_names(model, task) or None,
        )
        wrapped = peft.get_peft_model(model, peft_config)
    except ValueError as error:
        raise UserError(
            f"LoRA cannot be put into this {model.config.model_type!r} at targets={config.targets}, "
            f"target_parameters={config.target_parameters}: {error}"
        ) from None
    for layer in [m for m in wrapped.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]:
        if "default" not in layer.lora_A or type(layer.lora_A["default"]) is not nn.Linear:
            raise UserError(f"a mixture stands at linear layers and expert tensors, not at {type(layer).__name__}")
        for name, side in (("down", layer.lora_A), ("up", layer.lora_B)):
            copies = 1 if config.share == name else config.modules
            # B starts at zero in every copy, so that the model starts unchanged.
            reset = _reset_a if config.copies_start == "own" and name == "down" else None
            side["default"] = mixture_of(side["default"], copies, reset)
    return wrapped


def _reset_a(one: nn.Linear) -> None:
    nn.init.kaiming_uniform_(one.weight, a=5**0.5)
