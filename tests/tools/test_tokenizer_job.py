"""`megamf tokenizer` from the command line."""

import pytest

from megamf.cli import run
from megamf.data.tokenizer import load_tokenizer
from megamf.tools.tokenizer import main


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.py").write_text(f"def f{n}(value, other):\n    return value + other * {n} - naïve\n" * 3)
    (folder / "empty.py").write_text("")
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trains(folder, tmp_path, capsys, kind):
    out = tmp_path / "new" / "t.model"
    assert run(main, ["--input", str(folder), "--vocab_size", "295", "--type", kind, "--output", str(out)]) == 0
    assert f"{kind}, 295 pieces, document end 2; 1 bad document skipped (1 empty" in capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert tokenizer.vocab_size == 295
    assert tokenizer.decode(tokenizer.encode("\tif x:\r\n  é")) == "\tif x:\r\n  é"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "20"], "vocab_size=20"),
        (["--vocab-size", "295", "--on-bad", "fail"], "bad document (empty)"),
        (["--vocab-size", "295", "--max-megabytes", "0"], "--max-megabytes 0"),
        (["--vocab-size", "295", "--extensions", "rs"], "holds no file"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, options, message):
    assert run(main, ["--input", str(folder), "--output", str(tmp_path / "t.model"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
