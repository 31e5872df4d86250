"""Which layouts (expert parallelism x ZeRO stage) fit on a device, and which one to take."""

from dataclasses import dataclass

from megamf.config import ConfigError, RunConfig
from megamf.plan.memory import RankMemory, rank_memory

# The least communication first: stage 1 moves as many bytes as stage 0, stage 2 reduces at every micro batch.
STAGE_ORDER = (1, 2, 0)
# Share of a device's memory that a plan may fill; the rest is for buckets, workspaces and fragmentation.
FILL = 0.9


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out, with what a rank then needs."""

    ep: int
    zero_stage: int
    memory: RankMemory
    fits: bool


def layouts(
    config: RunConfig,
    num_ranks: int,
    device_memory: int,
    *,
    eps: list[int] | None = None,
    imbalance: float = 1.5,
) -> list[Layout]:
    """Every layout of `num_ranks` ranks, fewest expert-parallel ranks first. `device_memory` in bytes.

    `eps` restricts the expert-parallel degrees. Raises ConfigError where one does not
    divide ranks or experts.
    """
    degrees = eps if eps is not None else _possible_degrees(config, num_ranks)
    found = []
    for ep in degrees:
        try:
            config.parallel.model_copy(update={"ep": ep}).check(num_ranks, config.model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for stage in STAGE_ORDER:
            if stage == 0 and config.train.precision == "bf16":
                continue  # the trainer refuses it: DeepSpeed keeps fp32 masters from stage 1 on
            memory = rank_memory(config, num_ranks, ep=ep, zero_stage=stage, imbalance=imbalance)
            found.append(Layout(ep, stage, memory, memory.total <= FILL * device_memory))
    return found


def recommend(candidates: list[Layout]) -> Layout | None:
    """The first that fits: expert parallelism only as far as memory demands, then least communication."""
    return next((layout for layout in candidates if layout.fits), None)


def _possible_degrees(config: RunConfig, num_ranks: int) -> list[int]:
    degrees = []
    for ep in range(1, num_ranks + 1):
        try:
            config.parallel.model_copy(update={"ep": ep}).check(num_ranks, config.model)
        except ValueError:
            continue
        degrees.append(ep)
    return degrees
