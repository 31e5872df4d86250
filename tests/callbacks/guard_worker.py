"""One rank that runs training jobs one after the other in one process group, with faults and with batches left out.

Run as `python guard_worker.py OUT JOBS_JSON`; a job is {"config": ..., "faults": [...], "copy": [FROM, TO] or null,
"without": the first samples of global batches that its loader passes over}. Writes OUT/NAME.json on rank 0.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from megamf import faults
from megamf.build import build_trainer
from megamf.config import validate
from megamf.data.loader import MicroBatch, StepLoader
from megamf.errors import TrainingFailed
from megamf.parallel.launch import identify, process_group


class LoaderWithout:
    """A loader in whose data some global batches do not exist."""

    def __init__(self, loader: StepLoader, without: list[int], global_batch: int) -> None:
        self.loader, self.without, self.global_batch = loader, sorted(without), global_batch

    def step(self, consumed: int) -> list[MicroBatch]:
        for first in self.without:
            if consumed >= first:
                consumed += self.global_batch
        return self.loader.step(consumed)


def main() -> None:
    torch.set_num_threads(1)
    process, out = identify(os.environ), Path(sys.argv[1])
    with process_group(process):
        for job in json.loads(Path(sys.argv[2]).read_text()):
            if job["copy"] and process.rank == 0:
                source, target = map(Path, job["copy"])
                shutil.copytree(source, target / "checkpoints" / source.name)
            torch.distributed.barrier()
            faults._faults = faults.parse({"MEGAMF_FAULTS": json.dumps(job["faults"])})
            config = validate(job["config"])
            failure = None
            try:
                with build_trainer(config, process) as (trainer, _):
                    trainer.loader = LoaderWithout(trainer.loader, job["without"], config.train.global_batch)
                    trainer.fit()
            except TrainingFailed as error:
                failure = str(error)
            ended = {"failure": failure, "step": trainer.step, "consumed": trainer.consumed}
            (out / f"{config.run.dir.name}-{process.rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
