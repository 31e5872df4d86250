"""One rank that trains jobs, with edits of checkpoints by rank 0 in between, all in one process group.

Run as `python surgery_worker.py OUT WORK_JSON`; a piece of work is {"train": CONFIG} or {"edit": [JOB, WORD...]}. Of a
training job, this rank's share of the state before the first step goes to `resumed-RANK.safetensors` in `run.dir`.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from elastic_worker import LeaveState

from megamf.build import build_trainer
from megamf.config import validate
from megamf.parallel.launch import identify, process_group


def edit(job: str, words: list[str]) -> None:
    """`megamf JOB WORDS`."""
    assert importlib.import_module(f"megamf.tools.{job}").main(words) == 0


def main() -> None:
    torch.set_num_threads(1)
    process = identify(os.environ)
    with process_group(process):
        for work in json.loads(Path(sys.argv[2]).read_text()):
            if "edit" in work and process.rank == 0:
                job, *words = work["edit"]
                edit(job, words)
            torch.distributed.barrier()
            if "train" in work:
                with build_trainer(validate(work["train"]), process) as (trainer, _):
                    trainer.callbacks.append(LeaveState())
                    trainer.fit()


if __name__ == "__main__":
    main()
