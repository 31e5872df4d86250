from types import SimpleNamespace

import pytest
from rich.console import Console

from megamf.callbacks.progress import ProgressDisplay, describe, duration


def trainer(step: int, steps: int = 10) -> SimpleNamespace:
    train, tune = SimpleNamespace(steps=steps, global_batch=4, seq_len=8), SimpleNamespace(strategy="full")
    return SimpleNamespace(is_main=True, step=step, config=SimpleNamespace(train=train, tune=tune))


def result(step: int) -> SimpleNamespace:
    return SimpleNamespace(step=step, loss=2.5, lr=1e-3, grad_norm=0.5, seconds=0.5)


@pytest.mark.parametrize(
    ("show_bar", "terminal", "bar"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_bar_only_on_a_terminal_and_only_when_wanted(show_bar, terminal, bar):
    display = ProgressDisplay(show_bar)
    display.console = Console(stderr=True, force_terminal=terminal, quiet=True)
    display.on_train_start(trainer(0))
    assert (display.bar is not None) == bar
    display.on_train_end(trainer(0))


def test_a_log_file_gets_whole_lines(capsys):
    display = ProgressDisplay(True)
    display.on_train_start(trainer(4))
    display.on_step_end(trainer(10), result(10))
    display.on_evaluation(trainer(10), {"loss": 1.0, "perplexity": 2.718, "bits_per_byte": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "resumed at step 4 of 10"
    assert lines[1].startswith("step 10/10 | loss 2.500 | 64 tokens/s | lr 1.00e-03 | grad norm 0.50 | eta 0:00:00")
    assert lines[2] == "step 10 | valid loss 1.0000 | perplexity 2.72 | 0.500 bits/byte"


def test_description_names_the_load_of_both_kinds():
    load = {f"{kind}_{what}": 0.5 for kind in ("attention", "mlp") for what in ("entropy", "dead_fraction")}
    assert describe({"loss": 1.0, "perplexity": 2.7} | load).endswith(
        "attention load 50% even, 50% dead | mlp load 50% even, 50% dead"
    )


def test_duration():
    assert duration(3723.4) == "1:02:03"


def test_sources_are_told_apart():
    line = describe({"loss": 2.0, "perplexity": 7.389, "loss/old": 1.5, "loss/new": 2.5})
    assert line == "valid loss 2.0000 (old 1.5000, new 2.5000) | perplexity 7.39"
