"""The one on-disk format: topology-free, atomic, checksummed."""

from megamf.checkpoint.background import BackgroundWriter, snapshot
from megamf.checkpoint.errors import DamagedCheckpoint
from megamf.checkpoint.files import check_space
from megamf.checkpoint.layout import EXP_AVG, EXP_AVG_SQ, GROUPS, MASTER, WEIGHTS, expert_name, full_name
from megamf.checkpoint.read import Checkpoint, check_model
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
    "resolve",
    "rotate",
    "save",
    "snapshot",
    "sweep",
    "verify",
    "write_rank",
]
