"""`megamf report`: reading metrics, summary, comparison of runs, plot."""

import json

import pytest

from megamf.cli import run
from megamf.errors import UserError
from megamf.tools import report


def write_run(folder, losses, *, first=1, checkpoint=None, extra=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": step, "tokens": step * 64, "loss": loss, "tokens_per_second": 10.0 * step, "mfu": 0.1})
        for step, loss in enumerate(losses, start=first)
    ]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n" + extra)
    if checkpoint:
        (folder / "checkpoints" / f"step-{checkpoint:08d}").mkdir(parents=True)
    return folder


def test_of_a_repeated_step_the_later_record_counts(tmp_path):
    folder = write_run(tmp_path / "a", [8.0, 7.0, 6.5])
    write_run(folder, [7.25, 6.0], first=2)
    assert [record["loss"] for record in report.read_metrics(folder)] == [8.0, 7.25, 6.0]


def test_evaluations_join_the_record_of_their_step(tmp_path):
    folder = write_run(tmp_path / "a", [8.0, 7.0], extra='{"step": 2, "valid_loss": 7.5}\n')
    records = report.read_metrics(folder)
    assert (len(records), records[1]["loss"], records[1]["valid_loss"]) == (2, 7.0, 7.5)
    assert report.summarise(records)["valid_loss"] == 7.5


def test_a_torn_last_line_is_passed_over_and_a_torn_inner_one_is_not(tmp_path):
    folder = write_run(tmp_path / "a", [8.0, 7.0], extra='{"step": 3, "lo')
    assert len(report.read_metrics(folder)) == 2
    folder = write_run(tmp_path / "b", [8.0], extra='{"step": 2, "lo\n')
    write_run(folder, [6.0], first=3)
    with pytest.raises(UserError, match="line 2"):
        report.read_metrics(folder)


def test_summary_and_comparison(tmp_path, capsys):
    main = write_run(tmp_path / "main", [8.0, 7.0, 6.0, 5.0], checkpoint=2)
    same = write_run(tmp_path / "same", [8.0, 7.0, 6.0])
    out = tmp_path / "summary.json"
    evaluation = tmp_path / "e.json"
    evaluation.write_text('{"loss": 5.5, "bits_per_byte": 2.5}')
    argv = [str(main), "--same-as", str(same), "--summary", str(out), "--evaluation", str(evaluation)]
    assert run(report.main, [*argv, "--seconds", "3"]) == 0
    summary = json.loads(out.read_text())
    assert summary["resume_exact"] is True
    assert (summary["first_loss"], summary["final_loss"], summary["valid_loss"]) == (8.0, 5.0, 5.5)
    assert (summary["tokens_per_second"], summary["bits_per_byte"], summary["seconds"]) == (25.0, 2.5, 3.0)
    assert (summary["resumed_after_step"], summary["compared_steps"]) == (2, 3)
    assert "resume_exact" in capsys.readouterr().out


def test_one_different_loss_fails_the_report(tmp_path):
    main = write_run(tmp_path / "main", [8.0, 7.0, 6.0], checkpoint=1)
    other = write_run(tmp_path / "other", [8.0, 7.0, 6.0000001])
    out = tmp_path / "summary.json"
    assert run(report.main, [str(main), "--same-as", str(other), "--summary", str(out)]) == 1
    assert json.loads(out.read_text())["resume_exact"] is False


@pytest.mark.parametrize(("checkpoint", "message"), [(None, "never resumed"), (3, "share steps up to 3 only")])
def test_a_comparison_that_proves_nothing_is_refused(tmp_path, checkpoint, message, capsys):
    main = write_run(tmp_path / "main", [8.0, 7.0, 6.0], checkpoint=checkpoint)
    other = write_run(tmp_path / "other", [8.0, 7.0, 6.0])
    assert run(report.main, [str(main), "--same-as", str(other)]) == 2
    assert message in capsys.readouterr().err


def test_missing_pieces_exit_with_two(tmp_path, capsys):
    assert run(report.main, [str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert run(report.main, [str(tmp_path), "--hf", str(tmp_path)]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_plot_is_drawn_with_module_load(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"layer": layer, "kind": kind, "entropy": 1.0, "max_over_mean": 1.0, "dead_fraction": 0.0, "load": [0.5, 0.5]}
        for layer in range(2)
        for kind in ("attention", "mlp")
    ]
    record = {"step": 2, "loss": 7.0, "valid_loss": 7.5, "module_load": rows}
    folder = write_run(tmp_path / "a", [8.0], extra=json.dumps(record) + "\n")
    assert run(report.main, [str(folder), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
