"""Scores against other packages, the choice of copies during evaluation, and generation against single prompts."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score

from megamf.adapt.adamix import AdamixConfig, pairs_of, prepare, route
from megamf.adapt.finetune import scores_by_mode
from megamf.adapt.loading import load_base, load_tokenizer
from megamf.adapt.scores import evaluate, generate, macro_f1, text_scores
from megamf.adapt.tasks import Task

LABELS = ["c0", "c1", "c2"]


@pytest.fixture
def made(tiny_models, example_rows):
    def build(name, kind, number=11):
        task = Task(kind, load_tokenizer(tiny_models / name), 24, labels=LABELS if kind == "classification" else [])
        torch.manual_seed(1)
        return load_base(tiny_models / name, task), task, task.encode(example_rows(kind, number), "rows")

    return build


def all_outputs(model, task, examples):
    model.eval()
    with torch.no_grad():
        parts = [task.outputs(model, task.batch([example], torch.device("cpu"))) for example in examples]
    return (torch.cat(side) for side in zip(*parts))


def test_classification_scores(made):
    model, task, examples = made("bert", "classification")
    output, label = all_outputs(model, task, examples)
    scores = evaluate(model, task, examples, 4)
    found = output.argmax(-1)
    assert scores["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(output, label)), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(float((found == label).float().mean()))
    assert scores["macro_f1"] == pytest.approx(f1_score(label, found, average="macro"))


def test_macro_f1_with_a_class_that_is_never_found():
    wanted, found = np.array([0, 1, 2, 2, 1]), np.array([0, 2, 2, 2, 0])
    assert macro_f1(found, wanted) == pytest.approx(f1_score(wanted, found, average="macro"))


def test_regression_and_token_scores(made):
    model, task, examples = made("bert", "regression")
    output, label = all_outputs(model, task, examples)
    scores = evaluate(model, task, examples, 4)
    assert scores["loss"] == pytest.approx(float(((output - label) ** 2).mean()), rel=1e-5)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(output, label)[0], rel=1e-4)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(output, label)[0], rel=1e-4)

    model, task, examples = made("llama", "generation")
    output, label = all_outputs(model, task, examples)
    scores = evaluate(model, task, examples, 4)
    assert scores["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(output, label)), rel=1e-5)


def test_modes_are_scored_with_their_copies(made):
    base, task, examples = made("bert", "regression")
    model = prepare(base, AdamixConfig("adapter", modules=2, rank=2), "regression")
    pairs = pairs_of(model)
    with torch.no_grad():
        for pair in pairs:
            for one in (*pair.down.copies, *pair.up.copies):
                one.weight.add_(0.5 * torch.randn(one.weight.shape))
    scores = scores_by_mode(model, task, examples, 4, ["merged", "random", "fixed"], seed=1)
    assert all(pair.down.chosen is None for pair in pairs)
    assert scores["merged"] == evaluate(model, task, examples, 4)
    route(pairs, "fixed", index=1)
    assert scores["fixed"][1] == evaluate(model, task, examples, 4) != scores["fixed"][0]
    assert scores["random"] == scores_by_mode(model, task, examples, 4, ["random"], seed=1)["random"]
    single = prepare(made("bert", "regression")[0], AdamixConfig(modules=1), "regression")
    assert list(scores_by_mode(single, task, examples, 4, ["merged", "random", "fixed"], seed=1)) == ["merged"]


@pytest.mark.parametrize("name", ["llama", "molm"])
def test_generated_texts_do_not_depend_on_the_batch(made, name):
    model, task, examples = made(name, "generation", 5)
    together = generate(model, task, examples, 5, 6)
    assert together == [generate(model, task, [example], 1, 6)[0] for example in examples]
    assert any(together)


def test_text_scores():
    texts = ["returns the name of a file", "sets it"]
    assert text_scores(texts, texts)["chrf"] == pytest.approx(100) and text_scores(texts, texts)["exact"] == 1
    worse = text_scores(["returns the name", "sets it"], texts)
    assert worse["chrf"] < 90 and worse["exact"] == 0.5
