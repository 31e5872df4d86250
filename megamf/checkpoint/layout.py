"""Names of the on-disk format: directories, files, tensors, dtypes. Pure functions, no input or output."""

import re
from pathlib import Path

import torch

FORMAT = "megamf-checkpoint"
VERSION = 1

WEIGHTS, MASTER, EXP_AVG, EXP_AVG_SQ = GROUPS = ("weights", "master", "exp_avg", "exp_avg_sq")

MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"
STATE, MODEL, MODULES = "state.json", "model.json", "modules.json"
JSON_FILES = (STATE, MODEL, MODULES)
LATEST = "latest"
SHARD_SUFFIX = ".safetensors"

TEMPORARY = ".tmp-"
OLD = ".old-"
REPLACED = OLD + "replaced-"
ROTATED = OLD + "rotated-"

MAX_STEP = 99_999_999

# torch dtype -> (name in the manifest, name in a safetensors header)
DTYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("float64", "F64"),
    torch.float32: ("float32", "F32"),
    torch.float16: ("float16", "F16"),
    torch.bfloat16: ("bfloat16", "BF16"),
    torch.int64: ("int64", "I64"),
    torch.int32: ("int32", "I32"),
    torch.int16: ("int16", "I16"),
    torch.int8: ("int8", "I8"),
    torch.uint8: ("uint8", "U8"),
    torch.bool: ("bool", "BOOL"),
}
DTYPE_OF_NAME = {name: dtype for dtype, (name, _) in DTYPES.items()}
NAME_OF_CODE = {code: name for name, code in DTYPES.values()}

_STEP = re.compile(r"step-(\d{8})")
_NONCE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,250}")
_TENSOR = re.compile(rf"({'|'.join(GROUPS)})/([^\s/\\]+)")
_EXPERT = re.compile(r"(.+)\.(0|[1-9]\d*)")


def step_name(step: int) -> str:
    """Directory name of a step, `step-XXXXXXXX`. Raises ValueError outside 0..99999999."""
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step {step} is outside 0..{MAX_STEP}, the range of checkpoint names")
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step a directory name stands for, or None where it is no step directory."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def temporary_name(step: int, nonce: str) -> str:
    """Name of the directory that all ranks of one attempt write into."""
    if not _NONCE.fullmatch(nonce):
        raise ValueError(f"nonce {nonce!r} must be 1 to 64 characters out of A-Z a-z 0-9 _ -")
    return f"{TEMPORARY}{step_name(step)}-{nonce}"


def shard_name(rank: int, number: int) -> str:
    """Name of the `number`-th tensor file of a rank; readers never look into it."""
    return f"rank-{rank:05d}-{number:02d}{SHARD_SUFFIX}"


def marker_name(rank: int) -> str:
    """Name of the file that says a rank's tensors are on disk."""
    return f"rank-{rank:05d}.done.json"


def is_plain_file_name(name: str) -> bool:
    """True for a name that cannot leave its directory: no separators, no leading dot, ASCII only."""
    return _FILE.fullmatch(name) is not None


def full_name(name: str, group: str = WEIGHTS) -> str:
    """`GROUP/NAME`. Raises ValueError for an unknown group or a name with blanks or slashes."""
    full = f"{group}/{name}"
    if not _TENSOR.fullmatch(full):
        raise ValueError(f"{full!r} is no tensor name: GROUP/NAME with GROUP one of {', '.join(GROUPS)}")
    return full


def split_name(full: str) -> tuple[str, str]:
    """(GROUP, NAME) of a stored tensor name. Raises ValueError where it is none."""
    match = _TENSOR.fullmatch(full)
    if not match:
        raise ValueError(f"{full!r} is no tensor name: GROUP/NAME with GROUP one of {', '.join(GROUPS)}")
    return match[1], match[2]


def expert_name(key: str, expert: int) -> str:
    """Stored NAME of one module's slice of the expert tensor `key` ([E, in, out] in the model)."""
    return f"{key}.{expert}"


def split_expert(name: str) -> tuple[str, int] | None:
    """(state_dict key, global module index) where NAME ends in a number, else None."""
    match = _EXPERT.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def module_id(layer: int, kind: str, index: int) -> str:
    """Stable id of a module at its birth, e.g. `L03.mlp.017`."""
    return f"L{layer:02d}.{kind}.{index:03d}"


def step_path(root: Path, step: int) -> Path:
    """Where a finished step stands below the checkpoints directory `root`."""
    return Path(root) / step_name(step)
