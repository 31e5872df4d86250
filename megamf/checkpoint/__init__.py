"""The one on-disk format: topology-free, atomic, checksummed.

    checkpoints/
      latest                        text: the name of the newest complete step
      step-00001000/
        manifest.json               every file (bytes, sha256) and every tensor (file, dtype, shape, crc32)
        manifest.sha256             its checksum; `sha256sum -c` reads it
        state.json                  step, data position, random state, schedules, run configuration: the caller's
        model.json                  the model configuration
        modules.json                the module table
        rank-RRRRR-NN.safetensors   tensors; which file holds which has no meaning
      .tmp-*, .old-*                unfinished or half deleted; `sweep` removes them

Tensors are those of the logical model, named `GROUP/KEY` with the groups `weights`, `master` (float32 masters, where
the weights are not float32 themselves), `exp_avg` and `exp_avg_sq`, and state_dict keys; an expert tensor
[E, in, out] is stored as E tensors `GROUP/KEY.INDEX` of shape [in, out]. Numbers of ranks, EP degree and ZeRO stage
leave no trace in them. A state_dict key must therefore not end in a number.

Writing, with any number of ranks that share a file system and one nonce:

    tmp = begin(root, step, nonce)                        # all ranks
    write_rank(tmp, rank, tensors)                        # all ranks, each what it owns
    finish(tmp, root, step, num_ranks, state, ...)        # rank 0
    rotate(root, keep, keep_every)                        # rank 0

Reading: `Checkpoint(path)`. Before a run starts or resumes, rank 0 calls `sweep(root)`.
"""

from megamf.checkpoint.background import BackgroundWriter, snapshot
from megamf.checkpoint.errors import DamagedCheckpoint
from megamf.checkpoint.files import check_space
from megamf.checkpoint.layout import EXP_AVG, EXP_AVG_SQ, GROUPS, MASTER, WEIGHTS, expert_name, full_name
from megamf.checkpoint.read import Checkpoint, check_model
from megamf.checkpoint.reshard import reshard
from megamf.checkpoint.rotate import rotate, sweep
from megamf.checkpoint.schema import Manifest, Module, module_table
from megamf.checkpoint.steps import latest, list_steps, resolve
from megamf.checkpoint.verify import Problem, newest_good, verify
from megamf.checkpoint.write import abort, begin, finish, save, write_rank

__all__ = [
    "EXP_AVG",
    "EXP_AVG_SQ",
    "GROUPS",
    "MASTER",
    "WEIGHTS",
    "BackgroundWriter",
    "Checkpoint",
    "DamagedCheckpoint",
    "Manifest",
    "Module",
    "Problem",
    "abort",
    "begin",
    "check_model",
    "check_space",
    "expert_name",
    "finish",
    "full_name",
    "latest",
    "list_steps",
    "module_table",
    "newest_good",
    "reshard",
    "resolve",
    "rotate",
    "save",
    "snapshot",
    "sweep",
    "verify",
    "write_rank",
]
