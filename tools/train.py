"""Train a model, on one process or, under torchrun, deepspeed or srun, on many."""

from megamf.train import main

__all__ = ["main"]

if __name__ == "__main__":
    from megamf.cli import run

    raise SystemExit(run(main))
