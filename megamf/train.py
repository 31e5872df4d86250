"""Entry of a training run: parse, validate, build, train, close.

`megamf train`, `python -m megamf.train`, torchrun, the deepspeed launcher and srun all come here.
"""

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megamf.callbacks.preemption import Preemption
from megamf.config import ModelConfig, RunConfig, load_config
from megamf.errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from megamf.parallel.launch import Process

STOPPED_EARLY = 75


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line: a YAML file and/or a preset, then `section.key=value` overrides."""
    parser = argparse.ArgumentParser(prog="megamf train", description="Train a model.")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value")
    parser.add_argument("--preset", help="start from a packaged configuration")
    parser.add_argument(
        "--model-from",
        metavar="CHECKPOINT",
        help="the model is that of a checkpoint, with its numbers of modules in every layer; the weights come by "
        "checkpoint.init_from or checkpoint.resume",
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print sizes and memory, and stop")
    parser.add_argument(
        "--fake-world",
        type=int,
        metavar="N",
        help="with --dry-run: count the memory of one real step as one of N ranks, on tensors without storage",
    )
    # The deepspeed launcher adds this to every process; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    arguments.files = [word for word in arguments.words if "=" not in word]
    arguments.overrides = [word for word in arguments.words if "=" in word]
    if arguments.fake_world is not None and not arguments.dry_run:
        parser.error(f"--fake-world {arguments.fake_world} needs --dry-run: a fake world cannot train")
    if arguments.fake_world is not None and arguments.fake_world < 1:
        parser.error(f"--fake-world {arguments.fake_world}: at least 1")
    if len(arguments.files) > 1:
        parser.error(f"one configuration file, not {len(arguments.files)}: {' '.join(arguments.files)}")
    return arguments


def model_from(path: str | None) -> ModelConfig | None:
    """The model of a checkpoint (step, checkpoints or run directory). Raises UserError where there is none."""
    if path is None:
        return None
    from megamf.evaluate.weights import CheckpointWeights

    with CheckpointWeights(Path(path)) as weights:
        return weights.model


def train(config: RunConfig, process: "Process", preemption: Preemption) -> int:
    """Build everything, train, close. Returns the exit code."""
    from megamf.build import build_trainer

    with build_trainer(config, process, preemption) as (trainer, _):
        trainer.fit()
    return STOPPED_EARLY if preemption.stopped else 0


def main(argv: list[str] | None = None) -> int:
    """Run the job; 0 done, 1 training cannot go on, 2 for the user's mistakes, 75 stopped early with a checkpoint.

    Rank 0 tells what went wrong in full, the others in a line.
    """
    arguments = parse(argv)
    # Before torch is imported, which takes longest of all that comes before the data.
    with Preemption() as preemption:
        return job(arguments, preemption)


def job(arguments: argparse.Namespace, preemption: Preemption) -> int:
    """`main`, its signals being noted."""
    from megamf.parallel.launch import identify

    process = identify(os.environ)
    if process.rank == 0:
        logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
        logging.getLogger("megamf").setLevel(logging.INFO)
    try:
        path = arguments.files[0] if arguments.files else None
        model = model_from(arguments.model_from)
        config = load_config(path, preset=arguments.preset, overrides=arguments.overrides, model=model)
        if arguments.dry_run:
            from megamf.dry_run import dry_run

            return dry_run(config, process.world, arguments.fake_world)
        return train(config, process, preemption)
    except (UserError, TrainingFailed) as error:
        if process.rank == 0:
            raise
        print(f"megamf: rank {process.rank}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Exception:
        if process.world == 1:
            raise
        # At its end the interpreter would wait for threads and connections, and some rank may be gone for good.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    from megamf.cli import run

    raise SystemExit(run(main))
