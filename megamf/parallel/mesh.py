"""The rank grid: `arange(world).view(edp, ep)`. A row shares one copy of the experts, a column replicates a share.

Every rank has tokens of its own. Expert parameters are split over `ep` (a row) and replicated over `edp` (a column);
all other parameters are replicated over all ranks.

Sequences see a second grid of the same ranks, `arange(world).view(data, context)`: a row shares its sequences. The two
grids have nothing to do with each other, since experts do not ask where in its sequence a token stands.
"""

from dataclasses import dataclass

import torch.distributed as dist

from megamf.errors import UserError
from megamf.parallel.launch import TIMEOUT


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. The groups are process groups; `context_group` is None where no sequence is split."""

    rank: int
    world: int
    ep: int
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    context: int = 1
    context_group: dist.ProcessGroup | None = None

    @property
    def ep_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.rank % self.ep

    @property
    def edp_rank(self) -> int:
        """Which replica of that share."""
        return self.rank // self.ep

    @property
    def edp(self) -> int:
        """How many replicas of every expert there are."""
        return self.world // self.ep

    @property
    def context_rank(self) -> int:
        """Which part of its sequences this rank holds."""
        return self.rank % self.context

    @property
    def group_name(self) -> str:
        """The name under which DeepSpeed files the two expert groups."""
        return f"ep_size_{self.ep}"


_context_groups: dict[tuple[dist.ProcessGroup, int], dist.ProcessGroup] = {}


def create_mesh(ep: int, context: int = 1) -> Mesh:
    """Create the groups, once for every `ep` and `context`; collective.

    Raises UserError if one of them does not divide the world.
    """
    from deepspeed.utils import groups

    rank, world = dist.get_rank(), dist.get_world_size()
    if world % ep:
        raise UserError(f"world size {world} is not divisible by parallel.ep={ep}")
    if world % context:
        raise UserError(f"world size {world} is not divisible by parallel.context={context}")
    name = f"ep_size_{ep}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep)
    expert_groups = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    return Mesh(rank, world, ep, *expert_groups, context, _context_group(context))


def _context_group(context: int) -> dist.ProcessGroup | None:
    """This rank's group of consecutive ranks; every rank must come here, since it takes part in making all of them."""
    if context == 1:
        return None
    key = (dist.group.WORLD, context)
    if key not in _context_groups:
        _context_groups[key] = dist.new_subgroups(context, timeout=TIMEOUT)[0]
    return _context_groups[key]
