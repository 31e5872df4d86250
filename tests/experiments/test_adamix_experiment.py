"""The two tasks are made of the corpora without a document in both files; the page is written from what runs left."""

import json

import pytest

from megamf.errors import UserError
from megamf.experiments import _adamix_data as data
from megamf.experiments import _adamix_page as page
from megamf.experiments.adamix import SECTIONS, SUMMARIES, TASKS, Sizes, best_rates, commands, searches
from megamf.experiments.pages import READING_BEGIN
from megamf.experiments.stages import Study
from megamf.tools.adamix import _parser

CODE = '''
def one(a):
    """Return the first of what was given."""
    return a[0]

def bare(a):
    return a

def only():
    """Has no code besides its docstring."""

class C:
    def two(self):
        """
        Set the value; the second line.

        More.
        """
        self.x = 1
'''


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_functions_of_a_file():
    rows = list(data.functions(CODE))
    assert [row["target"] for row in rows] == [
        " Return the first of what was given.",
        " Set the value; the second line.",
    ]
    assert rows[0]["prompt"] == "def one(a):\n    return a[0]\n\n# What it does:"
    assert list(data.functions("print 'old'")) == []


def test_sections(tmp_path):
    corpus = tmp_path / "english.jsonl"
    with corpus.open("w") as file:
        for section in (*data.SECTIONS, "arm"):
            for number in range(8):
                text = "\n\n".join(f"{section} {number} {part} " + "word " * 20 for part in range(5)) + "\n\nshort"
                row = {"text": text, "source": "linux-doc-6.1", "path": f"x/_sources/{section}/a{number}.rst"}
                file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"text": "other", "source": "anarchism", "path": "gpu"}) + "\n")
    assert data.write_sections(corpus, tmp_path, 6, 4) == {"train": 48, "valid": 32}
    rows = {split: read(tmp_path / f"sections-{split}.jsonl") for split in ("train", "valid")}
    assert {row["label"] for row in rows["train"]} == set(data.SECTIONS)
    of = {split: {tuple(row["text"].split()[:2]) for row in part} for split, part in rows.items()}
    assert not of["train"] & of["valid"] and all(row["text"].startswith(row["label"]) for row in rows["train"])
    first = (tmp_path / "sections-train.jsonl").read_bytes()
    data.write_sections(corpus, tmp_path, 6, 4)
    assert first == (tmp_path / "sections-train.jsonl").read_bytes()
    with pytest.raises(UserError, match="30 paragraphs of admin-guide for train, 31 are needed"):
        data.write_sections(corpus, tmp_path, 31, 4)


def test_summaries(tmp_path):
    corpus = tmp_path / "python.jsonl"
    line = 'def f{i}_{j}(x):\n    """Return number {j} of file {i}."""\n    return x\n'
    texts = ["\n".join(line.format(i=i, j=j) for j in range(5)) for i in range(8)]
    corpus.write_text("".join(json.dumps({"text": text, "source": "stdlib"}) + "\n" for text in texts))
    assert data.write_summaries(corpus, tmp_path, 10, 4) == {"train": 10, "valid": 4}
    files = [{row["target"].split()[-1] for row in read(tmp_path / f"summaries-{s}.jsonl")} for s in ("train", "valid")]
    assert files[1] <= {"0.", "4."} and not files[0] & files[1]
    with pytest.raises(UserError, match="30 short functions for train"):
        data.write_summaries(corpus, tmp_path, 31, 4)


def rates():
    losses = dict.fromkeys(searches(Sizes.of(25)), 2.0) | {"sections-search-lora-3e-3": 1.0}
    return best_rates(losses), losses


def test_commands_are_those_that_the_job_takes():
    chosen, _ = rates()
    assert chosen["sections", "lora"] == "3e-3" and chosen["summaries", "full"] == SUMMARIES.rates["full"][0]
    runs = commands(Sizes.of(25), 2, chosen)
    assert len(runs) == 2 * sum(len(task.methods) for task in TASKS)
    for name, command in (runs | searches(Sizes.of(25))).items():
        args = _parser().parse_args(command.split()[2:])
        assert "search" in name or "-full-" in name or args.rank > 1
        assert "-no-sharing-" not in name or args.lr == float(chosen[name.partition("-")[0], "lora"])
    singles = [command for name, command in searches(Sizes.of(25)).items() if "full" not in name]
    assert all("--modules 1" in command for command in singles)
    small, usual = Sizes.of(1), Sizes.of(25)
    assert small.summary_rows < usual.summary_rows and small.section_rows < usual.section_rows


def test_page(tmp_path):
    study = Study(tmp_path / "work")
    chosen, losses = rates()
    runs = commands(Sizes.of(1), 2, chosen)
    for number, name in enumerate(runs):
        kind = "classification" if name.startswith("sections") else "generation"
        scores = {"loss": 1.0 + number / 100, "accuracy": 0.5, "macro_f1": 0.4}
        record = {
            "parameters": {
                "trained": 1000,
                "head": 0 if "full" in name else 10,
                "merged": 0 if "full" in name else 200,
            },
            "recipe": {"epochs": 2, "batch_size": 16},
            "examples": {"train": 5, "valid": 3},
            "labels": ["a", "b"] if kind == "classification" else [],
            "scores": {"merged": scores, "generated": {"chrf": 20.0, "bleu": 3.0}},
            "samples": [{"text": f"a|b {name}", "reference": "c"}],
        }
        if "adamix" in name:
            record["scores"]["random"] = scores
        study.path(name).mkdir()
        (study.path(name) / "adamix.json").write_text(json.dumps(record))
    path = tmp_path / "page.md"
    page.write(study, path, SECTIONS, SUMMARIES, runs, 2, chosen, losses)
    path.write_text(path.read_text().replace(READING_BEGIN, f"{READING_BEGIN}\nBy hand."))
    page.write(study, path, SECTIONS, SUMMARIES, runs, 2, chosen, losses)
    text = path.read_text()
    assert "By hand." in text and (tmp_path / "page" / "scores.png").stat().st_size > 1000
    assert "| LoRA | 1,000 | 210 | 50.0 ± 0.0 | 40.0 ± 0.0 |" in text and "| all |" in text and "a\\|b" in text
    assert "| sections | lora | 1e-3: 2.000 | **3e-3: 1.000** | 1e-2: 2.000 |" in text


def test_mean_and_spread():
    assert page.mean_and_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert page.mean_and_spread([50.0, 52.0]) == "51.0 ± 1.4"
    assert page.mean_and_spread([None, None]) == "–" and page.mean_and_spread([0.5]) == "0.500"
