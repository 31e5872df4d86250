"""New modules in a trained model: random ones, noisy copies, or modules of another checkpoint of the same widths.

Shapes: N tokens, D width, E modules of a place, F expert width, G router width.
Source: the ModuleFormer paper, section on inserting new modules: the router's matrix A grows by A' (equation 9).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megamf.checkpoint import Checkpoint
from megamf.checkpoint.layout import expert_name
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.modularity.edit import Arrangement, Kept, Made, model_of, module_counts
from megamf.modularity.inputs import module_inputs
from megamf.modularity.places import PARTS, Kind, Place
from megamf.modularity.streamed import bring

# A new module's probability that cannot be told from none in float32 (half a unit in the last place is 6e-8).
QUIET_PROBABILITY = 1e-9
WIDTHS: dict[Kind, tuple[str, ...]] = {
    "attention": ("n_embd", "att_hidden", "n_head"),
    "mlp": ("n_embd", "ffd_hidden", "activation_function"),
}


@dataclass(frozen=True)
class Template:
    """What one new module is made from: weight(part) [in, out], row() or None where the router has none for it."""

    weight: Callable[[str], torch.Tensor]
    row: Callable[[], torch.Tensor] | None
    origin: str


def generator(seed: int, *name: object) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and a name."""
    digest = hashlib.blake2b(":".join(map(str, (seed, *name))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_template(model: ModelConfig, place: Place, number: int, seed: int) -> Template:
    """As a module of a fresh model: U(-1/in, 1/in)."""
    hidden = model.att_hidden if place.kind == "attention" else model.ffd_hidden

    def weight(part: str) -> torch.Tensor:
        shape = (model.n_embd, hidden) if part == "experts" else (hidden, model.n_embd)
        bound = 1.0 / shape[0]
        return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, place, number, part))

    return Template(weight, None, "random")


def copied_template(
    donor: Checkpoint, donor_model: ModelConfig, place: Place, index: int, noise: float, seed: int
) -> Template:
    """A module of `donor`, each tensor with Gaussian noise of `noise` times its own root mean square."""
    ids = {(Place(row.layer, row.kind), row.index): row.id for row in donor.modules}
    origin = f"{donor.manifest.run_id[:8]}/{ids[place, index]}"

    def noisy(value: torch.Tensor, *name: object) -> torch.Tensor:
        value = value.float()
        if noise:
            draw = torch.randn(value.shape, generator=generator(seed, place, index, origin, *name))
            value = value + noise * value.square().mean().sqrt() * draw
        return value

    def weight(part: str) -> torch.Tensor:
        key = place.expert_keys()[PARTS.index(part)]
        return noisy(donor.tensor(expert_name(key, index)), part)

    return Template(weight, lambda: noisy(donor.tensor(place.rows_key(donor_model))[index], "row"), origin)


def most_used(frequencies: Mapping[Place, list[float]], place: Place, count: int) -> list[int]:
    """Indices by falling frequency, over and over where `count` is larger than the place."""
    values = frequencies[place]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return [order[i % len(order)] for i in range(count)]


def table_frequencies(source: Checkpoint) -> dict[Place, list[float]]:
    """Load shares that training noted in the module table. Raises UserError where it noted none."""
    found: dict[Place, list[float]] = {}
    for row in sorted(source.modules, key=lambda row: (row.layer, row.kind, row.index)):
        if row.load is None or "share" not in row.load:
            raise UserError(
                f"{source.path} does not say how often {row.id} is used: give --statistics, made by "
                "`megamf modules show --json`"
            )
        found.setdefault(Place(row.layer, row.kind), []).append(float(row.load["share"]))
    return found


def check_widths(source: ModelConfig, donor: ModelConfig, kind: Kind, where: Path) -> None:
    """Raise UserError, with both values, unless modules of `donor` fit into `source`."""
    for name in WIDTHS[kind]:
        ours, theirs = getattr(source, name), getattr(donor, name)
        if ours != theirs:
            raise UserError(
                f"modules of {where} do not fit: {name} is {theirs} there and {ours} here; a transplant needs the "
                "same widths"
            )


def arrangement(
    source: Checkpoint,
    numbers: Mapping[Kind, int],
    template: Callable[[Place, int], Template],
    row: Callable[[Place, int, Template], torch.Tensor],
    *,
    zero_output: bool,
) -> Arrangement:
    """Every place with its own modules first and `numbers[kind]` new ones behind them."""
    found: dict[Place, list[Kept | Made]] = {}
    for place, count in module_counts(model_of(source)).items():
        slots: list[Kept | Made] = [Kept(i) for i in range(count)]
        for number in range(numbers[place.kind]):
            slots.append(_made(place, number, template(place, number), row, zero_output))
        found[place] = slots
    return found


def _made(place: Place, number: int, template: Template, row: Callable, zero_output: bool) -> Made:
    def weight(part: str) -> torch.Tensor:
        value = template.weight(part)
        return torch.zeros_like(value) if zero_output and part == "output_experts" else value

    return Made(weight, lambda: row(place, number, template), "inserted", template.origin)


def random_row(model: ModelConfig, place: Place, number: int, seed: int) -> torch.Tensor:
    """As in a fresh model: N(0, initializer_range), centroids N(0, 1)."""
    width = model.n_embd if model.gate_type == "linear" else model.gating_size
    std = 1.0 if model.gate_type == "gmm" else model.initializer_range
    return std * torch.randn(width, generator=generator(seed, place, number, "row"))


@torch.no_grad()
def quiet_rows(
    model: ModuleFormer, prefix: str | Path, *, seq_len: int, tokens: int = 4096, new: Mapping[Kind, int]
) -> dict[Place, torch.Tensor]:
    """Place -> a row [G or D] with which new modules are not chosen: their probability is below 1e-9 for every token.

    Outputs then stay as they are to float32 rounding, on data like PREFIX. The row is minus a direction on which all
    router features seen there are positive, long enough. Raises UserError, naming the place, where there is none, and
    for `gmm` routers, whose logits are bounded cosines.
    """
    if model.config.gate_type == "gmm":
        raise UserError("gate_type=gmm: its logits are bounded, so no new module can be quiet; take random rows")
    rows = {}
    for place, x_ND in module_inputs(model, prefix, seq_len, tokens).items():
        if not new[place.kind]:
            continue
        bring(model, place.layer)
        router = model.get_submodule(f"{place.prefix}.gate")
        h_NG = router.factors(x_ND)[0].double()
        lse_N = router.logits(x_ND).double().logsumexp(-1)
        direction = _positive_direction(h_NG, place)
        wanted = torch.tensor(QUIET_PROBABILITY, dtype=torch.float64).log()
        # -c d.h <= lse + log p for all tokens, with half as much again for tokens that were not seen.
        scale = 1.5 * (-(lse_N + wanted) / (h_NG @ direction)).max().clamp(min=1.0)
        rows[place] = (-scale * direction).float().cpu()
    return rows


def _positive_direction(h_NG: torch.Tensor, place: Place, rounds: int = 2000) -> torch.Tensor:
    """A unit vector d with d.h > 0 for every row, found as a perceptron finds it, with some margin."""
    unit_NG = h_NG / h_NG.norm(dim=1, keepdim=True).clamp(min=1e-30)
    direction = unit_NG.mean(0)
    for _ in range(rounds):
        margins = unit_NG @ direction / direction.norm().clamp(min=1e-30)
        wrong = margins <= 0.02
        if not wrong.any():
            return direction / direction.norm()
        direction = direction + unit_NG[wrong].mean(0)
    raise UserError(
        f"{place}: no direction is positive for all router features on this data, so that new modules cannot be made "
        "quiet there; take random rows (with a zero output they change little)"
    )
