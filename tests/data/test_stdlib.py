"""The built-in corpus is the library of the running Python, without what was installed beside it."""

import sysconfig
from pathlib import Path

from megamf.data.stdlib import help_documents, library_files

LIBRARY = Path(sysconfig.get_path("stdlib"))


def test_library_files():
    files = library_files()
    assert {LIBRARY / "os.py", LIBRARY / "json" / "decoder.py"} <= set(files)
    assert files == library_files()
    parts = [set(file.relative_to(LIBRARY).parts) for file in files]
    assert not any({"site-packages", "dist-packages", "__pycache__", "test", "tests"} & names for names in parts)
    assert set(files) <= set(library_files(with_tests=True))


def test_help_documents():
    documents = help_documents()
    names = [name for name, _ in documents]
    assert len(set(names)) == len(names) > 50
    joined = "".join(text for _, text in documents)
    assert 'The "if" statement' in joined
    assert "math.sqrt" in joined
    assert " at 0x" not in joined
