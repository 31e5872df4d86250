import pytest

from megamf.errors import UserError
from megamf.parallel.launch import Process, identify


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
