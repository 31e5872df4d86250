"""Text is told apart from code, tables and other languages; nothing is downloaded here."""

import gzip
import json

import pytest

from megamf.errors import UserError
from megamf.experiments import corpora

ENGLISH = "The scheduler keeps a list of the tasks that are ready to run, and it picks the one with the least time."
FRENCH = "Le noyau garde une liste des tâches qui sont prêtes, et il choisit celle qui est dans la file pour le moment."
GERMAN = "Der Kern hält eine Liste der Aufgaben, die nicht warten, und wählt die mit der kleinsten Zeit für sich aus."
CHINESE = "调度程序保存一个准备运行的任务列表，并从中选择时间最少的一个任务来运行。"
CODE = "for (i = 0; i < n; i++) { table[i] = lookup(names[i], flags | MASK); free(names[i]); }"
SAMPLES = {"english": ENGLISH, "french": FRENCH, "german": GERMAN, "chinese": CHINESE}


@pytest.mark.parametrize("name", corpora.LANGUAGES)
def test_a_language_is_known_from_others_and_from_code(name):
    language = corpora.LANGUAGES[name]
    taken = {other for other, text in SAMPLES.items() if corpora.reads_as(language, text)}
    assert taken == {name}
    assert not corpora.reads_as(language, CODE)
    assert not corpora.reads_as(language, "")


def test_paragraphs_of_html_and_manual_pages(tmp_path):
    page = tmp_path / "a.html"
    page.write_text(f"<html><head><title>no</title></head><body><script>x()</script><p>{ENGLISH}</p><td>1</td></body>")
    assert corpora._paragraphs(page, "html") == [ENGLISH]
    manual = tmp_path / "a.1.gz"
    manual.write_bytes(gzip.compress(f".TH A 1\n.SH NAME\n\\fBThe\\fP{ENGLISH[3:]}\n.PP\nshort\n".encode()))
    assert corpora._paragraphs(manual, "roff") == [ENGLISH]


def test_every_fiftieth_document_is_validation_and_files_appear_whole(tmp_path):
    documents = ({"text": f"{i}", "source": "s"} for i in range(120))
    counts = corpora._write(tmp_path, "x", documents)
    assert counts["valid_documents"] == 2 and counts["train_documents"] == 118
    valid = [json.loads(line)["text"] for line in (tmp_path / "x-valid.jsonl").read_text().splitlines()]
    assert valid == ["49", "99"]

    def failing():
        yield {"text": "a", "source": "s"}
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        corpora._write(tmp_path, "y", failing())
    assert not list(tmp_path.glob("*y-*"))


def test_an_unknown_corpus_is_named(tmp_path):
    with pytest.raises(UserError, match=r"klingon.*english"):
        corpora.build(tmp_path / "out", ("klingon",))
    assert not (tmp_path / "out").exists()
