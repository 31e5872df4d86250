"""A GPT-NeoX folder in `megamf train`, against transformers' model and torch's AdamW on the same documents."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megamf import train
from megamf.build import step_loader
from megamf.checkpoint import Checkpoint, list_steps, verify
from megamf.cli import run
from megamf.config import load_config
from megamf.data.loader import open_train
from megamf.hf.convert import import_hf
from megamf.hf.gpt_neox import public_name
from megamf.parallel.launch import Process, process_group
from megamf.tools.evaluate import main as evaluate
from megamf.tools.export_hf import main as export
from megamf.tools.modules import main as modules

TRAIN = [
    "train.steps=2", "train.seq_len=24", "train.micro_batch=2", "train.global_batch=4", "optim.warmup_steps=0",
    "optim.schedule=constant", "optim.lr=0.01", "optim.eps=0.001", "optim.clip=0", "logging.tensorboard=false",
    "checkpoint.every=1", "run.seed=3",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_process_group():
    """All runs here share one."""
    with process_group(Process(0, 1, 0)):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=48, initializer_range=0.2, rotary_pct=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("neox") / "pythia"
    GPTNeoXForCausalLM(config).save_pretrained(place)
    return place


def arguments(folder, corpus, out, *more):
    import_hf(folder, out / "imported") if not (out / "imported").exists() else None
    return [
        f"run.dir={out / 'run'}", f"data.train=[{{path: {corpus}}}]", "--model-from", str(out / "imported"),
        f"checkpoint.init_from={out / 'imported'}", *TRAIN, *more,
    ]  # fmt: skip


def documents(config):
    """Step -> (input, label) of every document of its global batch, cut where a row begins or a document ends."""
    for step in range(config.train.steps):
        found = []
        with step_loader(open_train(config), config, Process(0, 1, 0)) as loader:
            for batch in loader.step(step * config.train.global_batch):
                for row, label, start in zip(batch.input_BT, batch.label_BT, batch.start_BT):
                    cuts = [*start.unique().tolist(), len(row)]
                    found += [(row[a:b], label[a:b]) for a, b in pairwise(cuts)]
        yield found


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_two_updates_are_those_of_transformers(folder, corpus, tmp_path, zero):
    given = arguments(folder, corpus, tmp_path, f"deepspeed={zero}")
    assert run(train.main, given) == 0
    model = GPTNeoXForCausalLM.from_pretrained(folder)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=0.001,
    )  # fmt: skip
    config = load_config(tmp_path / "run" / "config.yaml")
    losses = []
    for batch in documents(config):
        assert len(batch) > 4, "rows of several documents"
        sums = [F.cross_entropy(model(x[None]).logits[0], y, reduction="sum") for x, y in batch]
        count = sum(int((y != -100).sum()) for _, y in batch)
        loss = torch.stack(sums).sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records if "loss" in record] == pytest.approx(losses, rel=1e-5)
    assert losses[1] < losses[0]
    state = {name.replace("lm_head", "embed_out"): value for name, value in model.state_dict().items()}
    with Checkpoint(tmp_path / "run" / "checkpoints") as checkpoint:
        assert checkpoint.step == 2 and checkpoint.modules == [] and "exp_avg" in checkpoint.groups
        for name in checkpoint.logical_shapes("weights"):
            assert torch.allclose(checkpoint.full(name), state[public_name(name)], rtol=1e-4, atol=2e-6), name


def test_checkpoint_resume_evaluate_and_export(folder, corpus, tmp_path, capsys):
    given = arguments(folder, corpus, tmp_path, "train.activation_checkpointing=full")
    assert run(train.main, given) == 0
    whole = Checkpoint(tmp_path / "run" / "checkpoints")
    verify(whole.path)
    assert list_steps(tmp_path / "run" / "checkpoints") == [1, 2]
    again = [word.replace(str(tmp_path / "run"), str(tmp_path / "again")) for word in given]
    resume = f"checkpoint.resume={tmp_path / 'run' / 'checkpoints' / 'step-00000001'}"
    assert run(train.main, [*[word for word in again if "init_from" not in word], resume]) == 0
    with whole, Checkpoint(tmp_path / "again" / "checkpoints") as resumed:
        for name in whole.logical_shapes("weights"):
            assert torch.equal(whole.full(name), resumed.full(name)), name
    capsys.readouterr()
    assert run(export, [str(tmp_path / "run"), str(tmp_path / "hf"), "--check"]) == 0
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4
    assert "2 steps, 192 tokens" in (tmp_path / "hf" / "README.md").read_text()
    for place in (tmp_path / "run", tmp_path / "hf"):
        record = tmp_path / "record.json"
        assert run(evaluate, [str(place), "--data", str(corpus), "--max-batches", "2", "--json", str(record)]) == 0
        capsys.readouterr()


def test_what_needs_experts_is_refused(folder, corpus, tmp_path, capsys):
    for more, message in (
        (["tune.strategy=inserted"], "tune.strategy=inserted needs experts, but model.kind=gpt_neox has none"),
        (["parallel.ep=2"], "world size 1 is not divisible"),
        (["model.kind=dense"], "model.kind='dense' in the command line, 'gpt_neox' in the checkpoint"),
    ):
        assert run(train.main, arguments(folder, corpus, tmp_path, *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert run(modules, ["show", str(tmp_path / "imported"), "--data", str(corpus)]) == 2
    assert "kind=gpt_neox" in capsys.readouterr().err
    assert run(train.main, [*arguments(folder, corpus, tmp_path), "--dry-run"]) == 0
    assert "gpt_neox" in capsys.readouterr().out
