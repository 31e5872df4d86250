"""A save that fails on one rank ends the run on every rank, with the reason, and leaves what was there."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from megamf.checkpoint import list_steps, verify

SETTINGS = [
    "model.vocab_size=61", "model.n_layer=1", "model.n_embd=16", "model.att_hidden=16", "model.ffd_hidden=16",
    "model.n_att_experts=4", "model.n_mlp_experts=4", "model.gating_size=8", "model.bos_token_id=null",
    "model.eos_token_id=0", "train.steps=200", "train.seq_len=24", "train.micro_batch=1", "train.global_batch=4",
    "optim.warmup_steps=1", "checkpoint.every=2", "logging.tensorboard=false", "parallel.ep=2",
]  # fmt: skip
TENSORS = 45  # of rank 1 in one save
# The second save fails, on one of two ranks.
FAULTS = {
    "full": {"at": "save.shard", "action": "full_disk", "rank": 1, "step": 4},
    # Beside training the second save is told by the tensors before it: how far the steps are by then is not fixed.
    "full-background": {"at": "save.shard", "action": "full_disk", "rank": 1, "after": TENSORS},
    "read-only": {"at": "save.begin", "action": "read_only", "rank": 0, "step": 4},
    "unpublished-background": {"at": "save.manifest", "action": "full_disk", "rank": 0, "after": 1},
}
REASON = {"read-only": "Read-only file system"}


@pytest.fixture(scope="module")
def runs(corpus, launch_ranks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saves")
    jobs = []
    for name, fault in FAULTS.items():
        background = f"checkpoint.background={json.dumps(name.endswith('background'))}"
        arguments = [f"run.dir={root / name}", f"data.train=[{{path: {corpus}}}]", *SETTINGS, background]
        jobs.append({"name": name, "arguments": arguments, "faults": [fault]})
    launch_ranks(Path(__file__).with_name("jobs_worker.py"), 2, jobs, root / "out")
    return root


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_ends_and_says_why(runs, name):
    codes = [json.loads((runs / "out" / f"codes-{rank}.json").read_text())[name] for rank in (0, 1)]
    assert codes == [2, 2]
    said = "".join((runs / "out" / f"{name}-{rank}.err").read_text() for rank in (0, 1))
    assert REASON.get(name, "No space left on device") in said
    assert str(runs / name / "checkpoints") in said and "untouched" in said


@pytest.mark.parametrize("name", FAULTS)
def test_the_checkpoint_before_is_as_it_was(runs, name):
    checkpoints = runs / name / "checkpoints"
    assert list_steps(checkpoints) == [2]
    assert (checkpoints / "latest").read_text() == "step-00000002\n"
    assert verify(checkpoints / "step-00000002") == []
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["latest", "step-00000002"]


def test_a_rank_saves_as_many_tensors_as_the_faults_count_on(runs):
    with safe_open(runs / "full" / "checkpoints" / "step-00000002" / "rank-00001-00.safetensors", "pt") as file:
        assert len(list(file.keys())) == TENSORS


@pytest.mark.parametrize("name", [name for name in FAULTS if name.endswith("background")])
def test_a_failure_beside_training_is_told_with_one_of_the_next_steps(runs, name):
    """Not at the end, nor with the save that comes after: training does not go far past what cannot be saved."""
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert 4 <= lines[-1]["step"] < 200
