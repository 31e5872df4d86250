"""One rank that resumes and trains jobs, and leaves the state that it found on resuming, as checkpoints name it.

Run as `python elastic_worker.py OUT JOBS_JSON`; a job is {"config": ...}. This rank's share of the state goes to
`resumed-RANK.safetensors` in `run.dir`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megamf.build import build_trainer
from megamf.callbacks.base import Callback
from megamf.checkpoint.background import snapshot
from megamf.config import validate
from megamf.parallel.launch import identify, process_group
from megamf.parallel.state import optimizer_step, owned_state


class LeaveState(Callback):
    """Comes after resuming, before the first step."""

    def on_train_start(self, trainer) -> None:
        tensors = snapshot(owned_state(trainer.engine, trainer.mesh))
        # A rank that owns nothing still leaves a file.
        tensors[f"optimizer_step/{trainer.mesh.rank}"] = torch.tensor(optimizer_step(trainer.engine))
        save_file(tensors, trainer.config.run.dir / f"resumed-{trainer.mesh.rank}.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    process = identify(os.environ)
    with process_group(process):
        for job in json.loads(Path(sys.argv[2]).read_text()):
            with build_trainer(validate(job["config"]), process) as (trainer, _):
                trainer.callbacks.append(LeaveState())
                trainer.fit()


if __name__ == "__main__":
    main()
