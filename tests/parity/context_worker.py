"""One rank of the context parity test: steps that are looked into, then whole runs as `megamf train` would make them.

Run as `python context_worker.py OUT WORK_JSON` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
WORK is {"cases": {NAME: {"config", "steps"}}, "jobs": [{"config", "copy": [FROM, TO] or null}]}.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megamf.build import build_trainer, step_loader
from megamf.config import RunConfig, validate
from megamf.data.loader import open_train
from megamf.parallel.context import Transfer
from megamf.parallel.launch import Process, identify, process_group
from megamf.parallel.state import full_gradients, owned_state
from megamf.trainer import Trainer

GATHER, ADD_UP = Transfer.gather, Transfer.add_up


def run_case(config: RunConfig, steps: int, process: Process) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Gradients of the first step, the whole state after it, and losses and gradient norms of all steps.

    `context_bytes` is what this rank handed to the collectives of its context group, in all steps together.
    """
    sent = count_bytes()
    with step_loader(open_train(config), config, process) as loader:
        trainer = Trainer(config, loader)
        tensors: dict[str, torch.Tensor] = {}
        engine_backward = trainer.engine.backward

        def backward_and_look(loss: torch.Tensor) -> None:
            engine_backward(loss)
            # Before clipping, which stage 0 does right after this.
            if trainer.step == 0 and trainer.engine.is_gradient_accumulation_boundary():
                found = full_gradients(trainer.engine, trainer.mesh)
                tensors.update({f"gradients/{name}": value for name, value in found.items()})

        trainer.engine.backward = backward_and_look
        seen: dict[str, list[float]] = {"loss": [], "aux_loss": [], "grad_norm": [], "tokens": []}
        for _ in range(steps):
            result = trainer.train_step(loader.step(trainer.consumed))
            for key, values in seen.items():
                values.append(getattr(result, key))
            if result.step == 1:
                owned = {name: value.clone() for name, value in owned_state(trainer.engine, trainer.mesh)}
                shares: list = [None] * process.world
                dist.all_gather_object(shares, owned)
                tensors.update({name: value for share in shares for name, value in share.items()})
    seen["context_bytes"] = [sent["keys"], sent["gradients"]]
    return tensors, seen


def count_bytes() -> dict[str, int]:
    """From here on, bytes of the keys and of their gradients that a rank sends to each other one of its group."""
    sent = {"keys": 0, "gradients": 0}

    def gather(self: Transfer, own_TBX: torch.Tensor) -> torch.Tensor:
        sent["keys"] += own_TBX.nbytes * (self.num_ranks - 1)
        return GATHER(self, own_TBX)

    def add_up(self: Transfer, grad_SBX: torch.Tensor) -> None:
        ADD_UP(self, grad_SBX)
        sent["gradients"] += self.under_way[1].nbytes * (self.num_ranks - 1)

    Transfer.gather, Transfer.add_up = gather, add_up
    return sent


def main() -> None:
    torch.set_num_threads(1)
    out, work = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    process = identify(os.environ)
    with process_group(process):
        for name, case in work["cases"].items():
            tensors, seen = run_case(validate(case["config"]), case["steps"], process)
            if process.rank == 0:
                save_file(tensors, out / f"{name}.safetensors")
                (out / f"{name}.json").write_text(json.dumps(seen))
        for job in work["jobs"]:
            if job["copy"] and process.rank == 0:
                source, target = map(Path, job["copy"])
                shutil.copytree(source, target / "checkpoints" / source.name)
            dist.barrier()
            with build_trainer(validate(job["config"]), process) as (trainer, _):
                trainer.fit()


if __name__ == "__main__":
    main()
