"""`megamf train` in this process: what it leaves behind, and what it refuses, with exit code 2 and nothing lost."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from megamf import faults, train
from megamf.build import build_trainer
from megamf.callbacks.preemption import SIGNALS
from megamf.checkpoint import Checkpoint, latest, list_steps, save, verify
from megamf.cli import run
from megamf.config import ModelConfig, load_config
from megamf.modularity.edit import Kept, rearrange
from megamf.modularity.insert import arrangement, random_row, random_template
from megamf.modularity.places import Place, module_size
from megamf.parallel.launch import Process, process_group
from megamf.parallel.state import torch_optimizer

MODEL = [
    "model.vocab_size=61", "model.n_layer=2", "model.n_embd=16", "model.att_hidden=16", "model.ffd_hidden=16",
    "model.n_att_experts=4", "model.n_mlp_experts=4", "model.gating_size=8", "model.bos_token_id=null",
    "model.eos_token_id=0",
]  # fmt: skip
TRAIN = [
    "train.steps=4", "train.seq_len=24", "train.micro_batch=2", "train.global_batch=4", "optim.warmup_steps=1",
    "train.eval_batches=1", "data.valid_fraction=0.1", "checkpoint.every=2", "logging.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process_group():
    """All runs here share one."""
    with process_group(Process(0, 1, 0)):
        yield


@pytest.fixture(autouse=True)
def signal_handlers():
    """Whatever a run that failed has left, the next test finds the handlers as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert run(train.main, arguments(directory, corpus)) == 0
    return directory


def arguments(directory: Path, corpus: Path, *more: str) -> list[str]:
    return [f"run.dir={directory}", f"data.train=[{{path: {corpus}}}]", *MODEL, *TRAIN, *more]


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_directory_holds_what_it_should(finished):
    assert sorted(entry.name for entry in finished.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    steps = [record for record in records(finished) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        keys = {"step", "tokens", "loss", "aux_loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
        assert keys <= record.keys()
        assert record["tokens"] == record["step"] * 4 * 24
    load = steps[-1]["module_load"]
    assert [(row["layer"], row["kind"]) for row in load] == [
        (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp"),
    ]  # fmt: skip
    assert all(abs(sum(row["load"]) - 1) < 1e-6 for row in load)
    [valid] = [record for record in records(finished) if "valid_loss" in record]
    assert valid["step"] == 4 and valid["valid_bits_per_byte"] > 0
    assert list_steps(finished / "checkpoints") == [2, 4]
    with Checkpoint(latest(finished / "checkpoints")) as checkpoint:
        assert checkpoint.step == 4 and checkpoint.state["consumed_samples"] == 16
        shares = [module.load["share"] for module in checkpoint.modules if (module.layer, module.kind) == (1, "mlp")]
        assert shares == pytest.approx(load[3]["load"])


def test_a_finished_run_has_nothing_left_to_do(finished, corpus, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(train.main, arguments(tmp_path / "run", corpus)) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_dry_run_prints_and_writes_nothing(tmp_path, corpus, capsys):
    assert run(train.main, [*arguments(tmp_path / "run", corpus), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "n_att_experts: 4" in printed and "parameters" in printed and "memory" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optim.speed=3"], "unknown key optim.speed (value 3)"),
        (["model.k_mlp=5"], "k_mlp=5 is larger than n_mlp_experts=4"),
        (["train.global_batch=5"], "train.global_batch=5 is not divisible by train.micro_batch=2"),
        (["parallel.ep=2"], "world size 1 is not divisible by parallel.ep=2"),
        (["deepspeed=nothing"], "nothing is neither a packaged configuration"),
        (["train.precision=bf16", "deepspeed=zero0"], "bf16"),
        (["train.seq_len=100000"], "100000"),
        (["model.vocab_size=60"], "vocab"),
        (["data.train=[]"], "data.train"),
        (["data.train=[{path: /nowhere/at/all}]"], "/nowhere/at/all"),
        (["checkpoint.resume=/nowhere/at/all"], "/nowhere/at/all"),
        (["optim.warmup_steps=5"], "longer than train.steps=4"),
        (["one.yaml", "two.yaml"], "one configuration file"),
        (["experts.backend=triton"], "triton"),
        (["experts.backend=megablocks"], "megablocks"),
        (["norm.backend=apex"], "NVIDIA apex"),
        (["optim.implementation=apex"], "NVIDIA apex"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_written(tmp_path, corpus, capsys, more, message):
    try:
        code = run(train.main, arguments(tmp_path / "run", corpus, *more))
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_fewer_experts_than_ranks(tmp_path, corpus, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    more = ["parallel.ep=5", "train.global_batch=10"]
    assert run(train.main, arguments(tmp_path / "run", corpus, *more)) == 2
    assert "layer 0 has 4 attention experts, parallel.ep=5 is more" in capsys.readouterr().err


def test_truncated_data(tmp_path, corpus, capsys):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"text{suffix}")
    with (tmp_path / "text.bin").open("rb+") as file:
        file.truncate(100)
    assert run(train.main, arguments(tmp_path / "run", tmp_path / "text")) == 2
    assert "100" in capsys.readouterr().err


def test_another_configuration_in_the_run_directory(finished, corpus, capsys):
    assert run(train.main, arguments(finished, corpus, "optim.lr=0.5", "optim.min_lr=0.1")) == 2
    printed = capsys.readouterr().err
    assert "optim.lr: 0.0003 there, 0.5 now" in printed
    assert list_steps(finished / "checkpoints") == [2, 4]


def test_never_resume_into_existing_checkpoints(finished, corpus, capsys):
    assert run(train.main, arguments(finished, corpus, "checkpoint.resume=never")) == 2
    assert "already holds step-00000004" in capsys.readouterr().err


def test_a_checkpoint_of_another_model(finished, corpus, tmp_path, capsys):
    more = [f"checkpoint.resume={finished}", "model.n_layer=1"]
    assert run(train.main, arguments(tmp_path / "run", corpus, *more)) == 2
    printed = capsys.readouterr().err
    assert "another model" in printed and "transformer.h.1" in printed


def test_weights_alone_are_no_run_to_resume(finished, corpus, tmp_path, capsys):
    with Checkpoint(latest(finished / "checkpoints")) as source:
        tensors = {f"weights/{name}": source.tensor(name) for name in source.names()}
        state = {"step": 0}
        save(tmp_path / "weights", 0, tensors, state, source.modules, source.model, run_id="test")
    assert run(train.main, arguments(tmp_path / "run", corpus, f"checkpoint.resume={tmp_path / 'weights'}")) == 2
    assert "checkpoint.init_from=" in capsys.readouterr().err


def test_no_space_leaves_the_checkpoint_before(finished, corpus, tmp_path, capsys):
    """A limit on the size of files stands for a full disk: the write fails in the middle of a shard."""
    shutil.copytree(finished, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")
    (checkpoints / "latest").write_text("step-00000002\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = run(train.main, arguments(tmp_path / "run", corpus))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert str(checkpoints) in capsys.readouterr().err
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["latest", "step-00000002"]
    assert latest(checkpoints).name == "step-00000002"
    assert verify(checkpoints / "step-00000002") == []


def test_without_the_extension_the_run_says_how_to_build_it(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr("megamf.ops.backend.EXTENSION_ERROR", "No module named 'megamf._C'")
    monkeypatch.delenv("MEGAMF_ALLOW_NAIVE", raising=False)
    assert run(train.main, arguments(tmp_path / "run", corpus)) == 2
    assert "pip install --no-build-isolation -e ." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def flip_a_byte(step: Path) -> Path:
    shard = max(step.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(finished, corpus, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shard = flip_a_byte(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert run(train.main, arguments(tmp_path / "run", corpus)) == 2
    printed = capsys.readouterr().err
    assert shard.name in printed and "step-00000002" in printed and "previous_on_damage" in printed


def test_the_good_checkpoint_before_is_used_when_asked(finished, corpus, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert run(train.main, arguments(tmp_path / "run", corpus, "checkpoint.previous_on_damage=true")) == 0
    again = [record for record in records(tmp_path / "run") if "loss" in record]
    assert again[2:] and [r["loss"] for r in again] == [r["loss"] for r in records(finished) if "loss" in r]


def missing_shard(step: Path) -> Path:
    shard = min(step.glob("*.safetensors"))
    shard.unlink()
    return shard


def manifest_of_another_run(step: Path) -> Path:
    """With its checksum, and of the same step and model: what a careless copy leaves."""
    other = step.parent.parent.parent / "other" / "checkpoints" / step.name
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(other / name, step / name)
    return step


@pytest.mark.parametrize("damage", [missing_shard, manifest_of_another_run])
def test_other_damage_is_named_and_the_one_before_used_when_asked(finished, corpus, tmp_path, capsys, damage):
    shutil.copytree(finished, tmp_path / "run")
    if damage is manifest_of_another_run:
        assert run(train.main, arguments(tmp_path / "other", corpus, "run.seed=1")) == 0
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    named = damage(step)
    assert run(train.main, arguments(tmp_path / "run", corpus)) == 2
    printed = capsys.readouterr().err
    assert str(step) in printed and named.name in printed
    assert "step-00000002" in printed and "previous_on_damage" in printed
    assert run(train.main, arguments(tmp_path / "run", corpus, "checkpoint.previous_on_damage=true")) == 0
    again = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [r["loss"] for r in again] == [r["loss"] for r in records(finished) if "loss" in r]
    assert verify(step) == []


def test_a_checkpoint_directory_that_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    assert run(train.main, arguments(tmp_path / "run", corpus)) == 2
    assert str(tmp_path / "run" / "checkpoints") in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints").read_text() == ""


def test_a_directory_that_becomes_read_only(finished, corpus, tmp_path, capsys, monkeypatch):
    """Root writes everywhere, so the file system's answer is made up."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000002\n")
    before = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    refused = [{"at": "save.begin", "action": "read_only"}]
    monkeypatch.setattr(faults, "_faults", faults.parse({"MEGAMF_FAULTS": json.dumps(refused)}))
    assert run(train.main, arguments(tmp_path / "run", corpus)) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'checkpoints'}" in printed and "Read-only file system" in printed
    assert "untouched" in printed
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_a_signal_stops_with_a_checkpoint_and_the_run_goes_on(finished, corpus, tmp_path):
    more = ["train.steps=4000", "checkpoint.every=0", "optim.schedule=constant"]
    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop_after_two_steps() -> None:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_two_steps)
    watcher.start()
    assert run(train.main, arguments(tmp_path / "run", corpus, *more)) == train.STOPPED_EARLY
    watcher.join()
    [step] = list_steps(tmp_path / "run" / "checkpoints")
    assert 2 <= step < 4000
    assert records(tmp_path / "run")[-1]["step"] == step


def test_training_starts_from_the_weights_of_another_run(finished, corpus, tmp_path):
    more = [
        f"checkpoint.init_from={finished}",
        "train.steps=1",
        "optim.lr=1e-9",
        "optim.min_lr=0",
        "optim.weight_decay=0",
    ]
    assert run(train.main, arguments(tmp_path / "run", corpus, *more)) == 0
    with (
        Checkpoint(latest(finished / "checkpoints")) as source,
        Checkpoint(latest(tmp_path / "run" / "checkpoints")) as found,
    ):
        assert found.step == 1 and found.state["optimizer_step"] == 1
        for name in source.names():
            torch.testing.assert_close(found.tensor(name), source.tensor(name), atol=1e-6, rtol=0)


def test_background_saving_writes_the_same(finished, corpus, tmp_path):
    assert run(train.main, arguments(tmp_path / "run", corpus, "checkpoint.background=true")) == 0
    with (
        Checkpoint(latest(finished / "checkpoints")) as source,
        Checkpoint(latest(tmp_path / "run" / "checkpoints")) as found,
    ):
        for group in source.groups:
            assert source.names(group) == found.names(group)
            for name in source.names(group):
                assert torch.equal(source.tensor(name, group), found.tensor(name, group))


@pytest.mark.parametrize("mode", ["experts", "full"])
def test_activation_checkpointing_changes_no_loss(finished, corpus, tmp_path, mode):
    assert run(train.main, arguments(tmp_path / "run", corpus, f"train.activation_checkpointing={mode}")) == 0
    found = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert found == pytest.approx([r["loss"] for r in records(finished) if "loss" in r], abs=1e-6)


@pytest.fixture(scope="module")
def edited(tmp_path_factory, corpus):
    """A run `base` of four steps; `grown`: with a new MLP module in layer 1; `pruned`: without one in layer 0."""
    edited = tmp_path_factory.mktemp("tuned")
    words = [f"run.dir={edited / 'base'}", f"data.train=[{{path: {corpus}}}]", *MODEL, *TRAIN]
    assert run(train.main, words) == 0
    with Checkpoint(edited / "base") as base:
        model = load_config(overrides=MODEL).model
        grown = arrangement(
            base,
            {"attention": 0, "mlp": 1},
            lambda place, number: random_template(model, place, number, 0),
            lambda place, number, _: random_row(model, place, number, 0),
            zero_output=False,
        )
        last = {place: slots for place, slots in grown.items() if place == Place(1, "mlp")}
        rearrange(base, edited / "grown", last, what={"job": "insert"})
        rearrange(base, edited / "pruned", {Place(0, "mlp"): [Kept(i) for i in (0, 2, 3)]}, what={"job": "prune"})
        # An inserted module before one that is none.
        slots = [grown[Place(1, "mlp")][i] for i in (0, 4, 1)]
        rearrange(base, edited / "mixed", {Place(1, "mlp"): slots}, what={"job": "insert"})
    return edited


def tuned_from(edited: Path, corpus: Path, name: str, source: str, *more: str) -> list[str]:
    """Of a run `name` that starts from `source`."""
    start = ["--model-from", str(edited / source), f"checkpoint.init_from={edited / source}"]
    return [f"run.dir={edited / name}", f"data.train=[{{path: {corpus}}}]", *start, *TRAIN, *more]


@pytest.mark.parametrize("resume", [False, True])
def test_a_pruned_model_is_tuned_on_without_typing_its_numbers(edited, corpus, resume):
    name = f"again-{resume}"
    more = [f"checkpoint.resume={edited / 'pruned'}", "train.steps=5"] if resume else []
    assert run(train.main, tuned_from(edited, corpus, name, "pruned", *more)) == 0
    with Checkpoint(edited / name) as checkpoint:
        assert checkpoint.model["n_mlp_experts_per_layer"] == [3, 4]
        assert checkpoint.state["optimizer_step"] == checkpoint.step == (5 if resume else 4)


def test_a_contradiction_names_both_values(edited, corpus, capsys):
    assert run(train.main, tuned_from(edited, corpus, "no", "pruned", "model.n_embd=32")) == 2
    assert "model.n_embd=32 in the command line, 16 in the checkpoint" in capsys.readouterr().err
    assert not (edited / "no").exists()


def test_state_of_the_trained_part_alone(edited, corpus):
    """One MLP module and its row; AdamW keeps two moments of each, and an fp32 copy where DeepSpeed needs one."""
    tree = [f"run.dir={edited / 'size'}", f"data.train=[{{path: {corpus}}}]", *TRAIN, "deepspeed=zero1"]
    tree += [f"checkpoint.init_from={edited / 'grown'}", "tune.strategy=router_rows"]
    with Checkpoint(edited / "grown") as checkpoint:
        model = ModelConfig.model_validate(checkpoint.model)
    with build_trainer(load_config(overrides=tree, model=model), Process(0, 1, 0)) as (trainer, _):
        trained = module_size(model, "mlp")
        moments = sum(
            state[key].numel()
            for state in torch_optimizer(trainer.engine).state.values()
            for key in ("exp_avg", "exp_avg_sq")
        )
        assert moments == 2 * trained
        assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == trained
        assert sum(group.numel() for group in trainer.engine.optimizer.bit16_groups_flat) == trained


def test_forgetting_is_seen_as_it_happens(edited, corpus, capsys):
    """Two validation sources: the loss on each, and together by their weights."""
    sources = f"data.valid=[{{path: {corpus}, weight: 3}}, {{path: {edited / 'other'}}}]"
    for suffix in (".bin", ".idx", ".json"):
        (edited / f"other{suffix}").write_bytes(corpus.with_name(corpus.name + suffix).read_bytes())
    assert (
        run(
            train.main,
            tuned_from(edited, corpus, "seen", "grown", sources, "tune.strategy=inserted", "data.valid_fraction=0"),
        )
        == 0
    )
    lines = [json.loads(line) for line in (edited / "seen" / "metrics.jsonl").read_text().splitlines()]
    [found] = [line for line in lines if "valid_loss" in line]
    old, new = found["valid_loss/text"], found["valid_loss/other"]
    assert old == new, "the same documents, so the same samples"
    assert found["valid_loss"] == pytest.approx(0.75 * old + 0.25 * new)
    assert f"(text {old:.4f}, other {new:.4f})" in capsys.readouterr().err
    with Checkpoint(edited / "seen") as after, Checkpoint(edited / "grown") as before:
        name = "transformer.h.1.mlpf.experts.weight"
        assert torch.equal(after.tensor(f"{name}.3"), before.tensor(f"{name}.3"))
        assert not torch.equal(after.tensor(f"{name}.4"), before.tensor(f"{name}.4"))


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("pruned", ["tune.strategy=inserted"], "has no inserted modules, which tune.strategy=inserted would train"),
        ("mixed", ["tune.strategy=inserted"], "needs the inserted modules last"),
        ("grown", ["tune.strategy=inserted", "deepspeed=zero3"], "use deepspeed=zero2"),
        ("grown", ["tune.strategy=inserted", "parallel.ep=2"], "needs parallel.ep=1, not 2"),
        ("grown", ["tune.inserted=all"], "tune.inserted=all needs tune.strategy=inserted or router_rows"),
        ("grown", ["tune.embeddings=true"], "tune.embeddings=True needs tune.strategy=inserted or router_rows"),
        ("grown", ["tune.rows_regularisation=0.1"], "tune.rows_regularisation=0.1 needs tune.strategy=inserted"),
        (
            "grown",
            ["tune.strategy=inserted", "tune.rows_regularisation=0.1", "losses.routing_regularisation=0.2"],
            "measure rows of the same routers: give one of the two",
        ),
    ],
)
def test_what_cannot_be_tuned(edited, corpus, capsys, source, more, message):
    assert run(train.main, tuned_from(edited, corpus, "refused", source, *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (edited / "refused").exists()


def test_nothing_to_tune(edited, corpus, capsys):
    command = [f"run.dir={edited / 'refused'}", f"data.train=[{{path: {corpus}}}]", *MODEL, *TRAIN]
    assert run(train.main, [*command, "tune.strategy=inserted"]) == 2
    assert "starts from nothing: give checkpoint.init_from" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_trained_less_is_not_resumed_as_one_that_trains_all(edited, corpus, capsys):
    assert run(train.main, tuned_from(edited, corpus, "less", "grown", "tune.strategy=router_rows")) == 0
    assert run(train.main, tuned_from(edited, corpus, "less", "grown", "train.steps=5")) == 2
    assert "tune.strategy: 'router_rows' there, 'full' now" in capsys.readouterr().err
    resume = [f"checkpoint.resume={edited / 'less'}", "train.steps=5"]
    assert run(train.main, tuned_from(edited, corpus, "more", "grown", *resume)) == 2
    assert "it was trained with tune.strategy=router_rows" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_checkpoint_of_a_tuned_run_is_passed_over(edited, corpus, capsys):
    command = tuned_from(edited, corpus, "hurt", "grown", "tune.strategy=inserted")
    assert run(train.main, command) == 0
    table = edited / "hurt" / "checkpoints" / "step-00000004" / "modules.json"
    table.write_bytes(table.read_bytes()[:-1])
    assert run(train.main, command) == 2
    assert "modules.json" in capsys.readouterr().err
    assert run(train.main, [*command, "checkpoint.previous_on_damage=true"]) == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().err
    assert not verify(table.parent)


def test_a_dry_run_says_that_frozen_parameters_need_less(edited, corpus, capsys):
    command = tuned_from(edited, corpus, "dry", "grown", "tune.strategy=router_rows", "--dry-run")
    assert run(train.main, command) == 0
    assert "trained (tune.strategy=router_rows)" in capsys.readouterr().out
