"""Real text that every Python installation carries: the standard library's source code and its help texts."""

import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Compiled modules whose documentation strings stand in no .py file; those an installation lacks are passed over.
_NAMES = """
    array binascii builtins cmath errno faulthandler gc itertools marshal math mmap select sys time unicodedata zlib
"""
COMPILED = _NAMES.split()


def library_files(with_tests: bool = False) -> list[Path]:
    """The .py files of the running Python's standard library, sorted; installed packages are left out."""
    skipped = NOT_LIBRARY if with_tests else NOT_LIBRARY | TEST_FOLDERS
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(root, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


@cache
def help_documents() -> tuple[tuple[str, str], ...]:
    """(name, text) of every help topic, then of the documentation strings of each compiled module."""
    topics = importlib.import_module("pydoc_data.topics").topics
    documents = [(name, topics[name]) for name in sorted(topics)]
    for name in COMPILED:
        if name in sys.builtin_module_names or importlib.util.find_spec(name) is not None:
            documents.append((name, "\n".join(_documentation(name))))
    return tuple(documents)


def _documentation(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    yield f"{name}\n\n{inspect.getdoc(module) or ''}\n"
    for member in sorted(vars(module)):
        thing = vars(module)[member]
        if member.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        yield f"{name}.{member}\n\n{inspect.getdoc(thing) or ''}\n"
        for method in sorted(vars(thing)) if inspect.isclass(thing) else ():
            documented = vars(thing)[method]
            if not method.startswith("_") and callable(documented) and inspect.getdoc(documented):
                yield f"{name}.{member}.{method}\n\n{inspect.getdoc(documented)}\n"
