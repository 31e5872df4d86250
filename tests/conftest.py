"""What tests of several rooms share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamf.checkpoint import module_table, save
from megamf.data.indexed import IndexedWriter, Metadata
from megamf.parallel.launch import free_port

# Rooms whose tests share a session's fixture (a Slurm cluster, a compiled emulator), and where the longest ones are.
WHOLE_ROOMS = ("slurm", "faults", "cuda")
FIRST = ("slurm", "parity", "faults", "kernels", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no CUDA device. The longest rooms come first."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
    rooms = {item: _room(item.nodeid) for item in items}
    items.sort(key=lambda item: FIRST.index(rooms[item]) if rooms[item] in FIRST else len(FIRST))


def _room(nodeid: str) -> str:
    """Its folder in `tests`, or its file."""
    return nodeid.partition("::")[0].split("/")[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (`-n`), a file stays with one of them, and so do some rooms as a whole.

    The groups of pytest-xdist 3.8 (`xdist_group`) have no effect with pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _room(nodeid) if _room(nodeid) in WHOLE_ROOMS else nodeid.partition("::")[0]

    return Rooms(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other take far longer than the work of tiny models, and round differently."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def launch_ranks() -> Callable[[Path, int, Any, Path], None]:
    """launch_ranks(script, world, work, out): `world` ranks of a script, all of which end well or the test fails.

    The script gets `out` and a JSON file with `work`.
    """

    def run(script: Path, world: int, work: Any, out: Path) -> None:
        out.mkdir()
        (out / "work.json").write_text(json.dumps(work))
        environment = os.environ | {
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
        }  # fmt: skip
        command = [sys.executable, str(script), str(out), str(out / "work.json")]
        ranks = []
        for rank in range(world):
            log = (out / f"rank-{rank}.log").open("w")
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=900) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        logs = "\n".join((out / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world))
        assert codes == [0] * world, logs

    return run


@pytest.fixture(scope="session")
def save_model():
    """save_model(root, model, step=0, state={}) -> step directory with the weights of a whole model, and no more."""

    def run(root: Path, model, step: int = 0, state: dict | None = None) -> Path:
        tensors = {}
        for key, value in model.state_dict().items():
            parts = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
            tensors |= {f"weights/{key}{suffix}": part for suffix, part in parts.items()}
        config = model.config
        dense = config.kind == "dense"
        modules = (
            []
            if dense
            else module_table(
                config.n_layer,
                config.n_att_experts_per_layer or config.n_att_experts,
                config.n_mlp_experts_per_layer or config.n_mlp_experts,
            )
        )
        tree = {"kind": config.kind} | config.model_dump(mode="json", exclude_unset=dense)
        return save(root, step, tensors, state or {}, modules, tree, run_id="r")

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Documents of 1 to 60 tokens ending in 0, so that rows hold several and some are cut; learnable by counting."""
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=61) as writer:
        for _ in range(400):
            body = (np.cumsum(rng.integers(1, 4, rng.integers(1, 60))) % 60 + 1).tolist()
            writer.add_document([*body, 0])
        facts = {"vocab_size": 61, "eod_id": 0, "appended_eod": True, "documents": 400, "bytes": 1}
        writer.commit(Metadata(tokenizer="numbers", tokenizer_sha256="0" * 64, tokens=writer.num_tokens, **facts))
    return prefix
