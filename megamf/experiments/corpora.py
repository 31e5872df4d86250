"""Real text in several languages for the experiments, out of Debian packages and this Python's standard library.

    python -m megamf.experiments.corpora OUT [--only french german]

Writes OUT/NAME-train.jsonl and OUT/NAME-valid.jsonl, a document a line (`text`, `source`: the package, and, but for
`python`, `path`: the file in it), for NAME in `python` (source code), `english`, `french`, `german` and `chinese`
(documentation and prose). Needs `apt-get` and `dpkg-deb`; the packages are downloaded and unpacked, not installed, so
no rights are needed. The texts have licences of their own and are therefore built where they are used.

A paragraph is taken when it reads as its language (share of the language's most frequent words, or of Han characters),
which also drops code, tables and untranslated rests; a paragraph that occurred before is dropped. Every 50th document
is validation.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from megamf.data.stdlib import library_files
from megamf.errors import UserError

VALID_EVERY = 50
MIN_PARAGRAPH = 25
MIN_DOCUMENT = 400


@dataclass(frozen=True)
class Package:
    """A Debian package, the form of its text files, and what must occur in the path of those that are read."""

    name: str
    form: str
    within: str = ""


@dataclass(frozen=True)
class Language:
    """Packages with text of one language and the words (or, for Chinese, the characters) that show it."""

    packages: tuple[Package, ...]
    frequent: frozenset[str]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LANGUAGES = {
    "english": Language(
        (
            Package("linux-doc-6.1", "rst", "_sources"),
            Package("postgresql-doc-15", "html"),
            Package("anarchism", "html"),
            Package("debian-handbook", "html", "en-US"),
        ),
        _words("the of and to in is that for it as with be by are this which not on or from can if an at has but will"),
    ),
    "french": Language(
        (
            Package("libreoffice-help-fr", "html"),
            Package("gimp-help-fr", "html"),
            Package("debian-handbook", "html", "fr-FR"),
            Package("debian-reference-fr", "html"),
            Package("gnome-user-docs", "page", "/fr/"),
            Package("manpages-fr", "roff"),
        ),
        _words("le la les de des du un une et est en pour dans que qui sur par pas avec ce sont au aux ou se vous il"),
    ),
    "german": Language(
        (
            Package("libreoffice-help-de", "html"),
            Package("gimp-help-de", "html"),
            Package("debian-handbook", "html", "de-DE"),
            Package("gnome-user-docs", "page", "/de/"),
            Package("manpages-de", "roff"),
        ),
        _words(
            "der die das und ist in den von zu mit sie ein eine auf für nicht werden wird dem des im als oder sich wenn"
        ),
    ),
    "chinese": Language(
        (
            Package("libreoffice-help-zh-cn", "html"),
            Package("debian-handbook", "html", "zh-CN"),
            Package("debian-reference-zh-cn", "html"),
            Package("linux-doc-6.1", "rst", "zh_CN"),
            Package("manpages-zh", "roff", "zh_CN"),
        ),
        frozenset(),
    ),
}
NAMES = ("python", *LANGUAGES)
MIN_FREQUENT_WORDS = 0.2
MIN_HAN = 0.5


def build(out: Path, names: tuple[str, ...] = NAMES) -> dict[str, dict[str, int]]:
    """Write the corpora and return, per name, the documents and bytes of train and valid.

    Raises UserError for an unknown name, where a package cannot be had, or where a package holds nothing usable.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"no corpus {', '.join(unknown)}; there are {', '.join(NAMES)}")
    out.mkdir(parents=True, exist_ok=True)
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            documents = _python() if name == "python" else _language(LANGUAGES[name], Path(folder))
            report[name] = _write(out, name, documents)
            print(f"{name}: {json.dumps(report[name])}", file=sys.stderr, flush=True)
    return report


def reads_as(language: Language, paragraph: str) -> bool:
    """Whether `paragraph` is running text of `language`."""
    if not language.frequent:
        solid = [character for character in paragraph if not character.isspace()]
        return bool(solid) and sum("\u4e00" <= c <= "\u9fff" for c in solid) / len(solid) >= MIN_HAN
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    if len(words) < 8 or sum(map(len, words)) < 0.6 * len("".join(paragraph.split())):
        return False
    return sum(word in language.frequent for word in words) / len(words) >= MIN_FREQUENT_WORDS


def _language(language: Language, work: Path) -> Iterator[dict[str, str]]:
    seen: set[bytes] = set()
    for package in language.packages:
        taken = 0
        for path in _files(_unpack(package.name, work), package):
            kept = []
            for paragraph in _paragraphs(path, package.form):
                digest = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
                if digest not in seen and reads_as(language, paragraph):
                    seen.add(digest)
                    kept.append(paragraph)
            text = "\n\n".join(kept)
            if len(text.encode()) >= MIN_DOCUMENT:
                taken += 1
                place = path.relative_to(work / package.name)
                yield {"text": text, "source": package.name, "path": str(place)}
        if not taken:
            raise UserError(f"package {package.name} holds no usable text; it may have changed its layout")


def _python() -> Iterator[dict[str, str]]:
    for path in library_files(with_tests=False):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text.encode()) >= MIN_DOCUMENT:
            yield {"text": text, "source": "stdlib"}


def _unpack(package: str, work: Path) -> Path:
    """The folder of the unpacked package, downloaded when it is not there yet."""
    folder = work / package
    if folder.exists():
        return folder
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is missing: the corpora are read from Debian packages")
    done = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
    archives = sorted(work.glob(f"{package}_*.deb"))
    if done.returncode or not archives:
        raise UserError(
            f"package {package} could not be downloaded (is `apt-get update` needed?): {done.stderr.strip()}"
        )
    subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(folder)], check=True)
    return folder


_SUFFIXES = {
    "html": (".html", ".html.gz", ".xhtml"),
    "rst": (".rst", ".rst.txt", ".rst.gz", ".rst.txt.gz"),
    "page": (".page",),
    "roff": tuple(f".{section}.gz" for section in range(1, 9)),
}


def _files(folder: Path, package: Package) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(_SUFFIXES[package.form])
        and package.within in f"{path.relative_to(folder)}"
        and path.is_file()
        and not path.is_symlink()
    )


def _paragraphs(path: Path, form: str) -> list[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", errors="replace")
    if form in ("html", "page"):
        parts = _html(text)
    elif form == "roff":
        bare = re.sub(r"(?m)^\.(?:B|I|BR|IR|RB|RI|BI|IB)\s+", "", text)
        parts = re.split(r"(?m)^[.'].*$", re.sub(r"\\f(?:\(..|\[[^]]*\]|.)|\\&", "", bare).replace("\\-", "-"))
    else:
        parts = re.split(r"\n\s*\n", text)
    clean = (re.sub(r"\s+", " ", part).strip() for part in parts)
    return [part for part in clean if len(part) >= MIN_PARAGRAPH]


_BLOCKS = _words("p li h1 h2 h3 h4 h5 h6 dd dt td th div pre blockquote tr title section article br")
_LEFT_OUT = _words("script style nav head")


class _Text(HTMLParser):
    """Collects the text of block elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._open: list[str] = []
        self._skipping = 0

    def flush(self) -> None:
        if text := "".join(self._open).strip():
            self.blocks.append(text)
        self._open = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in _LEFT_OUT
        if tag in _BLOCKS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        self._skipping = max(0, self._skipping - (tag in _LEFT_OUT))
        if tag in _BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._open.append(data)


def _html(text: str) -> list[str]:
    reader = _Text()
    reader.feed(text)
    reader.flush()
    return reader.blocks


def _write(out: Path, name: str, documents: Iterator[dict[str, str]]) -> dict[str, int]:
    counts = {"train_documents": 0, "train_bytes": 0, "valid_documents": 0, "valid_bytes": 0}
    partial = {split: out / f".{name}-{split}.jsonl.partial" for split in ("train", "valid")}
    files = {split: path.open("w", encoding="utf-8") for split, path in partial.items()}
    try:
        for index, document in enumerate(documents):
            split = "valid" if index % VALID_EVERY == VALID_EVERY - 1 else "train"
            files[split].write(json.dumps(document, ensure_ascii=False) + "\n")
            counts[f"{split}_documents"] += 1
            counts[f"{split}_bytes"] += len(document["text"].encode())
    except BaseException:
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise
    finally:
        for file in files.values():
            file.close()
    for split, path in partial.items():
        path.replace(out / f"{name}-{split}.jsonl")
    return counts


def main(argv: list[str] | None = None) -> int:
    """Build the corpora that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m megamf.experiments.corpora", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    args = parser.parse_args(argv)
    print(json.dumps(build(args.out, tuple(args.only)), indent=2))
    return 0


if __name__ == "__main__":
    from megamf.cli import run

    raise SystemExit(run(main))
