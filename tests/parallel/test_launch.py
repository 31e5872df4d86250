import os
from unittest import mock

import pytest
import torch

from megamf.errors import UserError
from megamf.parallel.launch import Process, identify, process_group
from megamf.parallel.mesh import create_mesh


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, Process(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Process(3, 8, 1)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"},
            Process(5, 6, 2),
        ),
        # Inside an allocation, but not started by srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, Process(0, 1, 0)),
        # torchrun under srun: torchrun's variables are the ones that count.
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
            | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"},
            Process(1, 4, 1),
        ),
    ],
    ids=["alone", "torchrun", "srun", "sbatch shell", "torchrun under srun"],
)
def test_identify(environment, process):
    assert identify(environment) == process


def test_incomplete_environment_names_what_is_missing():
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK"):
        identify({"RANK": "0"})


def test_rank_outside_the_world():
    with pytest.raises(UserError, match="RANK=4 is not below WORLD_SIZE=4"):
        identify({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})


@mock.patch.dict(os.environ)
def test_a_process_may_join_a_group_again():
    """Two runs of one process: the groups that DeepSpeed keeps are of the second, not dead ones of the first."""
    from deepspeed import comm
    from deepspeed.utils import groups

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for run in range(2):
        with process_group(Process(0, 1, 0)):
            mesh = create_mesh(1)
            assert groups._get_broadcast_src_rank() == 0, run
            for group in (groups._get_data_parallel_group(), mesh.ep_group, mesh.edp_group):
                assert comm.get_world_size(group) == 1 and comm.get_global_rank(group, 0) == 0, run
                total = torch.ones(2)
                torch.distributed.all_reduce(total, group=group)
                assert total.tolist() == [1, 1], run
        assert not torch.distributed.is_initialized() and "RANK" not in os.environ and "MASTER_PORT" not in os.environ
