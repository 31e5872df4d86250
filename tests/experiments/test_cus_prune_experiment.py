"""The experiment's script from end to end, on a tiny model and made-up corpora."""

import json

import torch
from compress_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megamf.cli import run
from megamf.experiments import cus_prune

SOURCES = {
    "french": ("libreoffice-help-fr", "manpages-fr"),
    "german": ("libreoffice-help-de", "manpages-de"),
    "english": ("linux-doc-6.1", "postgresql-doc-15"),
    "python": ("stdlib",),
    "chinese": ("manpages-zh",),
}


def corpora(folder):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, packages in SOURCES.items():
        for split in ("train", "valid"):
            rows = []
            for number in range(6):
                text = " ".join(f"w{i}" for i in torch.randint(38, (150,), generator=generator).tolist())
                rows.append({"text": text, "source": packages[number % len(packages)]})
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(folder):
    fast = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(38)}}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="<eos>")
    llama(layers=4).save_pretrained(folder / cus_prune.MODEL)
    tokenizer.save_pretrained(folder / cus_prune.MODEL)


def test_the_page_comes_out_of_stages_that_are_run_once(tmp_path, capsys):
    corpora(tmp_path / "corpora")
    weights(tmp_path / "weights")
    page = tmp_path / "page.md"
    arguments = ["--work", tmp_path / "work", "--corpora", tmp_path / "corpora", "--weights", tmp_path / "weights"]
    arguments = [str(one) for one in (*arguments, "--page", page, "--experts", "french-manuals", "--small")]
    assert run(cus_prune.main, arguments) == 0
    assert "[french-manuals-0.4-slicing]" in capsys.readouterr().err
    page.write_text(page.read_text().replace("reading: begin -->", "reading: begin -->\nmy own words"))
    before = page.read_text()
    assert "| Cus-Prun, intersection | " in before and "random, 3 seeds" in before and "absolute changes" in before
    assert (tmp_path / "page" / "french-manuals.png").is_file()
    assert run(cus_prune.main, arguments) == 0
    assert "slicing" not in capsys.readouterr().err
    assert page.read_text() == before


def test_an_experts_dimensions_hold_nothing_that_it_is_measured_on():
    for expert, parts in cus_prune.EXPERTS.items():
        measured = {(corpus, package) for corpus, packages, _ in parts["expert"] for package in packages}
        for name in cus_prune.DIMENSIONS:
            used = {(corpus, package) for corpus, packages, _ in parts[name] for package in packages}
            assert not used & measured, (expert, name)
