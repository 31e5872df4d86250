"""One rank of the layout parity test: trains the same batches in every layout and leaves what it saw.

Run as `python layout_worker.py OUT CASE_JSON...` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megamf.config import RunConfig, validate
from megamf.data.loader import StepLoader, document_end, open_train
from megamf.parallel.launch import identify, process_group
from megamf.parallel.state import full_gradients, full_weights
from megamf.trainer import Trainer


def run_case(config: RunConfig, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Gradients of the first step and weights after it, and losses and gradient norms of all."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    train = config.train
    loader = StepLoader(
        open_train(config),
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=rank,
        num_ranks=world,
        eod_id=document_end(config),
        document_mask=config.data.document_mask,
    )
    with loader:
        trainer = Trainer(config, loader)
        seen_tensors = {
            f"initial/{name}": tensor for name, tensor in full_weights(trainer.engine, trainer.mesh).items()
        }
        engine_backward = trainer.engine.backward

        def backward_and_look(loss: torch.Tensor) -> None:
            engine_backward(loss)
            # Before clipping, which stage 0 does right after this.
            if trainer.step == 0 and trainer.engine.is_gradient_accumulation_boundary():
                found = full_gradients(trainer.engine, trainer.mesh)
                seen_tensors.update({f"gradient/{name}": tensor for name, tensor in found.items()})

        trainer.engine.backward = backward_and_look
        seen: dict[str, list[float]] = {"loss": [], "aux_loss": [], "grad_norm": []}
        for _ in range(steps):
            result = trainer.train_step(loader.step(trainer.consumed))
            if trainer.engine.zero_optimization_stage() == 3:
                whole = [name for name, parameter in trainer.model.named_parameters() if parameter.numel()]
                assert not whole, f"whole after the step: {whole}"
            for key, values in seen.items():
                values.append(getattr(result, key))
            if trainer.step == 1:
                found = full_weights(trainer.engine, trainer.mesh)
                seen_tensors.update({f"stepped/{name}": tensor for name, tensor in found.items()})
    return seen_tensors, seen


def main() -> None:
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with process_group(identify(os.environ)):
        for name, case in cases.items():
            tensors, seen = run_case(validate(case["config"]), case["steps"])
            if torch.distributed.get_rank() == 0:
                save_file(tensors, out / f"{name}.safetensors")
                (out / f"{name}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
