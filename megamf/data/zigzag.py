"""Which tokens of a sequence a rank holds when several share it.

A sequence of `T` tokens is cut into 2*P equal chunks for P ranks; rank r holds chunks r and 2*P-1-r. A token attends to
all tokens before it, so an early and a late chunk together make the same work for every rank.
"""

import torch


def chunk_indices(rank: int, num_ranks: int) -> tuple[int, ...]:
    """The chunks that a rank holds, in the order of the sequence; the whole sequence is one chunk for one rank."""
    return (0,) if num_ranks == 1 else (rank, 2 * num_ranks - 1 - rank)


def take_part(x_BT: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """The rank's tokens of every row: [B, T / num_ranks]. Raises ValueError unless 2 * num_ranks divides T."""
    if num_ranks == 1:
        return x_BT
    if x_BT.shape[1] % (2 * num_ranks):
        raise ValueError(f"a sequence of {x_BT.shape[1]} tokens does not split into 2 x {num_ranks} equal chunks")
    chunks = x_BT.chunk(2 * num_ranks, dim=1)
    return torch.cat([chunks[index] for index in chunk_indices(rank, num_ranks)], dim=1)


def join_parts(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts of all ranks, in their order, each [B, T / num_ranks, ...], -> the whole [B, T, ...]."""
    if len(parts) == 1:
        return parts[0]
    halves = [part.chunk(2, dim=1) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=1)
