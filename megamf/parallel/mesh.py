"""The rank grid: `arange(world).view(edp, ep)`. A row shares one copy of the experts, a column replicates a share.

Every rank is a data-parallel rank. Expert parameters are split over `ep` (a row) and replicated over `edp` (a column);
all other parameters are replicated over all ranks.
"""

from dataclasses import dataclass

import torch.distributed as dist

from megamf.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. `ep_group` and `edp_group` are process groups; name is DeepSpeed's for the pair."""

    rank: int
    world: int
    ep: int
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup

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
    def group_name(self) -> str:
        """The name under which DeepSpeed files the expert groups."""
        return f"ep_size_{self.ep}"


def create_mesh(ep: int) -> Mesh:
    """Create the groups, once for every `ep`; collective. Raises UserError if ep does not divide the world."""
    from deepspeed.utils import groups

    rank, world = dist.get_rank(), dist.get_world_size()
    if world % ep:
        raise UserError(f"world size {world} is not divisible by parallel.ep={ep}")
    name = f"ep_size_{ep}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep)
    return Mesh(rank, world, ep, groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name))
