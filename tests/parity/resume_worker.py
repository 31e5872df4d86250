"""One rank that runs training jobs one after the other in one process group, as `megamf train` would each.

Run as `python resume_worker.py OUT JOBS_JSON`; a job is {"config": ..., "copy": [FROM, TO] or null}.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from megamf.build import build_trainer
from megamf.config import validate
from megamf.parallel.launch import identify, process_group


def main() -> None:
    torch.set_num_threads(1)
    process = identify(os.environ)
    with process_group(process):
        for job in json.loads(Path(sys.argv[2]).read_text()):
            if job["copy"] and process.rank == 0:
                source, target = map(Path, job["copy"])
                shutil.copytree(source, target / "checkpoints" / source.name)
            torch.distributed.barrier()
            with build_trainer(validate(job["config"]), process) as (trainer, _):
                trainer.fit()


if __name__ == "__main__":
    main()
