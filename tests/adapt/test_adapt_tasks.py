"""Examples: reading, tokens, batches, losses and mistakes in the files."""

import json

import pytest
import torch
import torch.nn.functional as F

from megamf.adapt.loading import load_base, load_tokenizer
from megamf.adapt.tasks import Columns, Task, batches, label_names, read_rows, shuffled
from megamf.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def task(tiny_models):
    return lambda kind, **options: Task(
        kind, load_tokenizer(tiny_models / "llama"), options.pop("length", 12), **options
    )


def test_classification_batch(task):
    made = task("classification", labels=["a", "b"])
    examples = made.encode([{"text": "w1 w2 w3", "label": "b"}, {"text": "w4", "label": "a"}], "f")
    batch = made.batch(examples, CPU)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    with pytest.raises(UserError, match=r"f, line 1: label 'c' is none of a, b"):
        made.encode([{"text": "w1", "label": "c"}], "f")


def test_pairs_of_texts_and_numbers(task):
    made = task("regression", columns=Columns(pair="other"))
    (example,) = made.encode([{"text": "w1", "other": "w2", "label": 3}], "f")
    assert example.ids == [3, 4] and example.label == 3.0
    assert made.batch([example], CPU)["labels"].dtype == torch.float32


def test_generation_labels_cover_target_and_end_only(task):
    made = task("generation")
    examples = made.encode([{"prompt": "w1 w2", "target": "w3"}, {"prompt": "w4", "target": "w5 w6"}], "f")
    batch = made.batch(examples, CPU)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1], [6, 7, 8, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 1], [-100, 7, 8, 1]]
    long = made.encode([{"prompt": " ".join(f"w{i}" for i in range(20)), "target": "w3 w4"}], "f")[0]
    assert len(long.ids) == 12 and long.ids[-3:] == [5, 6, 1] and long.ids[8] == 21
    only = made.encode([{"prompt": "w1", "target": " ".join(["w3"] * 30)}], "f")[0]
    assert len(only.ids) == 12 and int(only.label) == 1


def test_outputs_are_those_of_transformers_own_losses(task, tiny_models, example_rows):
    for kind, labels in (("generation", []), ("classification", ["c0", "c1", "c2"]), ("regression", [])):
        made = task(kind, labels=labels)
        model = load_base(tiny_models / "llama", made).eval()
        batch = made.batch(made.encode(example_rows(kind, 5), "f"), CPU)
        loss = made.loss(*made.outputs(model, batch))
        assert torch.allclose(loss, model(**batch).loss, rtol=1e-5), kind


def test_padding_changes_nothing(task, tiny_models, example_rows):
    for name in ("bert", "llama", "molm"):
        made = Task("classification", load_tokenizer(tiny_models / name), 12, labels=["c0", "c1", "c2"])
        model = load_base(tiny_models / name, made).eval()
        examples = made.encode(example_rows("classification", 4), "f")
        together = made.outputs(model, made.batch(examples, CPU))[0]
        alone = [made.outputs(model, made.batch([example], CPU))[0] for example in examples]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5), name


def test_consistency_is_over_target_tokens(task, tiny_models):
    made = task("generation")
    batch = made.batch(made.encode([{"prompt": "w1 w2 w3", "target": "w4"}], "f"), CPU)
    model = load_base(tiny_models / "llama", made).eval()
    output, label_N = made.outputs(model, batch)
    assert label_N.tolist() == [6, 1] and output.shape == (2, 40)
    other = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    p, q = output.log_softmax(-1), other.log_softmax(-1)
    expected = sum(F.kl_div(a, b, log_target=True, reduction="sum") for a, b in ((p, q), (q, p))) / 4
    assert torch.allclose(made.consistency(output, other), expected, rtol=1e-5)


def test_order_of_examples():
    numbers = list(range(10))
    assert sorted(shuffled(numbers, 0, 0)) == numbers
    assert shuffled(numbers, 0, 0) == shuffled(numbers, 0, 0)
    assert shuffled(numbers, 0, 0) != shuffled(numbers, 0, 1) and shuffled(numbers, 0, 0) != shuffled(numbers, 1, 0)
    assert [list(part) for part in batches(numbers, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_label_names():
    rows = [{"label": value} for value in (10, 9, 9, 2)]
    assert label_names(rows, "label", "f") == ["2", "9", "10"]
    assert label_names([{"label": "b"}, {"label": "a"}], "label", "f") == ["a", "b"]
    with pytest.raises(UserError, match=r"all examples are of class 'a'"):
        label_names([{"label": "a"}] * 2, "label", "f")


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("", "classification", "holds no example"),
        ("\n \n", "generation", "holds no example"),
        ("{", "classification", "line 1 is not JSON"),
        ('{"text": "a", "label": 1}\n[1]', "classification", "line 2 is a list"),
        ('{"words": "a", "label": 1}', "classification", "no column 'text'; it has 'words', 'label'"),
        ('{"text": "a"}', "regression", "no column 'label'"),
        ('{"text": 3, "label": 1}', "regression", "expected a text"),
        ('{"text": "a", "label": "x"}', "regression", "expected a number"),
        ('{"text": "a", "label": true}', "regression", "expected a number"),
        ('{"text": "a", "label": NaN}', "regression", "finite"),
        ('{"text": "a", "label": 0.5}', "classification", "expected a class"),
        ('{"prompt": "a"}', "generation", "no column 'target'"),
    ],
)
def test_mistakes_in_files(tmp_path, content, kind, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_rows(path, kind, Columns())


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="not a file"):
        read_rows(tmp_path, "generation", Columns())
    (tmp_path / "latin").write_bytes('{"text": "ä"}'.encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_rows(tmp_path / "latin", "regression", Columns())
    (tmp_path / "good").write_text(json.dumps({"text": "ä", "label": "x"}) + "\n\n")
    assert read_rows(tmp_path / "good", "classification", Columns()) == [{"text": "ä", "label": "x"}]
