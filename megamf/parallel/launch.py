"""Which process am I? The same answer under plain python, torchrun, the deepspeed launcher and srun."""

import datetime
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megamf.errors import UserError

# A collective that waits longer than this has lost a rank. Training has a watchdog that notices far earlier, and tells
# more; this is for everything else, and must not end a collective that waits for a long save.
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process among `world` processes; `local_rank` counts on its own machine and picks the GPU."""

    rank: int
    world: int
    local_rank: int

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU where there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def identify(environment: Mapping[str, str]) -> Process:
    """Read torchrun's or deepspeed's variables, else Slurm's, else be alone. Raises UserError where they contradict."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return Process(0, 1, 0)
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(f"{names[0]} is set, but {', '.join(missing)} is not: start with torchrun, deepspeed or srun")
    rank, world, local_rank = (int(environment[name]) for name in names)
    if not 0 <= rank < world:
        raise UserError(f"{names[0]}={rank} is not below {names[1]}={world}")
    return Process(rank, world, local_rank)


@contextmanager
def process_group(process: Process) -> Iterator[None]:
    """Join the process group, NCCL on GPUs and gloo on CPUs, and leave it; inside another such block do nothing.

    A lone process makes a group of one. Raises UserError where the processes cannot find each other.
    """
    if torch.distributed.is_initialized():
        yield
        return
    own = {"RANK": process.rank, "WORLD_SIZE": process.world, "LOCAL_RANK": process.local_rank}
    if process.world == 1:
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    added = [name for name in own if name not in os.environ]
    os.environ.update({name: str(own[name]) for name in added})
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"{process.world} processes need {' and '.join(missing)} in the environment to find each other")
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _quieten()

    import deepspeed

    # DeepSpeed would compile its shared-memory all-reduce at the first start of a CPU run and trust every peer to have
    # the same vector instructions; gloo alone needs neither.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=TIMEOUT, verbose=False)
    # Left through DeepSpeed, which else would hand the groups it keeps to the next block, where they are dead.
    try:
        yield
    except BaseException:
        # Some rank may be gone, and leaving in good order would wait for it.
        if process.world == 1:
            deepspeed.comm.destroy_process_group()
        raise
    else:
        deepspeed.comm.destroy_process_group()
    finally:
        # What is started later from here is no rank of the group that was.
        for name in added:
            os.environ.pop(name, None)


def _quieten() -> None:
    """DeepSpeed's remarks on import and torch's on DeepSpeed's calls tell a user nothing to act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
