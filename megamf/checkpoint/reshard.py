"""A checkpoint in other files: larger or smaller ones, with or without the optimizer's state.

No layout needs this to resume, for a checkpoint has no trace of one. It is for moving and publishing: a few large
files instead of one or more a rank, or weights alone at a fraction of the size.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megamf.checkpoint import layout
from megamf.checkpoint.files import check_space
from megamf.checkpoint.read import Checkpoint
from megamf.checkpoint.steps import list_steps
from megamf.checkpoint.write import MAX_FILE_BYTES, save
from megamf.errors import UserError


def reshard(
    source: Checkpoint,
    out: Path,
    *,
    groups: Sequence[str] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the same step below `out`, tensor by tensor, every byte checked on the way. Returns its directory.

    `groups`: those of `layout.GROUPS` to keep (default: all there are); the weights are always among them.
    `on_tensor(done, total)` counts tensors. At most `max_file_bytes` and one tensor are in memory. The state
    stays; without moments the run cannot be resumed from it, only started. Raises UserError where `out` holds
    checkpoints already, for groups that are not there and where the disk is full.
    """
    kept = tuple(source.groups if groups is None else groups)
    missing = [group for group in kept if group not in source.groups]
    if missing or layout.WEIGHTS not in kept:
        raise UserError(f"{source.path} has the groups {', '.join(source.groups)}; {', '.join(kept)} cannot be kept")
    if max_file_bytes < 1:
        raise UserError(f"files of {max_file_bytes} bytes hold nothing: at least 1")
    if list_steps(out):
        raise UserError(f"{out} already holds checkpoints: name another folder")
    names = [(group, name) for group in kept for name in source.names(group)]
    check_space(out if out.exists() else out.absolute().parent, source.num_bytes(kept))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (group, name) in enumerate(names, start=1):
            yield layout.full_name(name, group), source.tensor(name, group)
            if on_tensor is not None:
                on_tensor(done, len(names))

    return save(
        out,
        source.step,
        tensors(),
        source.state,
        source.modules,
        source.model,
        run_id=source.manifest.run_id,
        max_file_bytes=max_file_bytes,
    )
