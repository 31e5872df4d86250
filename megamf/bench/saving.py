"""What a save beside training costs the steps that it runs beside: python -m megamf.bench.saving

Idle steps and steps during a save take turns, so that whatever else the machine does meets both.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from megamf.bench.training import training_step
from megamf.checkpoint import BackgroundWriter, save, snapshot
from megamf.config import ModelConfig


def measure(rounds: int, width: int, directory: Path) -> dict[str, float]:
    """Medians over `rounds` of the seconds of a step alone and beside a save, of the copy that it begins with, and of
    the save; `growth` of a step's time, and of its thread's processor time, which a machine that others use as well
    disturbs less (but it knows nothing of cores that there are too few of); `megabytes` of one save."""
    step = training_step(model(width), 2, 128)
    step()
    # As many bytes as weights and moments of about four times this model, in tensors of 16 MB.
    live = {f"weights/layer.{i}.weight": torch.randn(2048, 2048) for i in range(8)}
    alone, beside, copies, saves = [], [], [], []
    buffers: dict[str, torch.Tensor] = {}
    with BackgroundWriter() as writer:
        for number in range(rounds):
            alone += [timed(step) for _ in range(4)]
            began = time.perf_counter()
            tensors = snapshot(live, buffers)
            copies.append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.submit(lambda n=number, t=tensors: save(directory, n, t, {"step": n}, [], {}, run_id="bench"))
            while writer.busy:
                seconds = timed(step)
                if writer.busy:
                    beside.append(seconds)
            saves.append(time.perf_counter() - began)
            writer.wait()
    found = {"copy_s": statistics.median(copies[1:] or copies), "save_s": statistics.median(saves)}
    for position, kind in enumerate(("", "_cpu")):
        before, during = (statistics.median(times[position] for times in steps) for steps in (alone, beside))
        found |= {f"alone{kind}_s": before, f"beside{kind}_s": during, f"growth{kind}": during / before - 1}
    size = sum(tensor.nbytes for tensor in live.values()) / 1e6
    return found | {"megabytes": size, "steps_beside": len(beside)}


def model(width: int) -> ModelConfig:
    """Small, with steps short enough for several beside one save."""
    return ModelConfig(
        vocab_size=512, n_layer=2, n_embd=width, n_head=1, att_hidden=width, ffd_hidden=width, n_att_experts=4,
        n_mlp_experts=4, gating_size=16, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


def timed(step) -> tuple[float, float]:
    """Seconds of one step, and of its thread's processor time."""
    began = time.perf_counter(), time.thread_time()
    step()
    return time.perf_counter() - began[0], time.thread_time() - began[1]


def main(argv: list[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m megamf.bench.saving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="saves, with steps between them (5)")
    parser.add_argument("--width", type=int, default=256, help="model width (256)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(arguments.rounds, arguments.width, Path(directory))
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
