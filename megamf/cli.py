"""`megamf JOB ...`: lists and runs the jobs found in tools/."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from megamf.errors import TrainingFailed, UserError


def jobs() -> dict[str, str]:
    """Name and one-line summary of every job, read without importing it."""
    import megamf.tools

    found = {}
    for file in sorted(Path(megamf.tools.__path__[0]).glob("*.py")):
        if file.stem.startswith("_"):
            continue
        summary = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = summary.splitlines()[0] if summary else ""
    return found


def normalise(argv: list[str]) -> list[str]:
    """`--some_flag=value_x` becomes `--some-flag=value_x`: in option names `-` and `_` are the same."""
    out = []
    for position, word in enumerate(argv):
        if word == "--":
            return out + argv[position:]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        out.append(word)
    return out


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a job's `main` and turn its outcome into an exit code: 2 for the user's mistakes, 1 for training that cannot
    go on, 130 for Ctrl-C."""
    try:
        return main(normalise(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"megamf: {error}", file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print(f"megamf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megamf: interrupted", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Entry of the `megamf` command."""
    words = sys.argv[1:] if argv is None else argv
    found = jobs()
    if not words or words[0] in ("-h", "--help"):
        print("usage: megamf JOB [options]; megamf JOB --help tells a job's options\n\njobs:")
        for name, summary in found.items():
            print(f"  {name.replace('_', '-'):<12} {summary}")
        return 0 if words else 2
    if words[0] == "--version":
        import megamf

        print(megamf.__version__)
        return 0
    name = words[0].replace("-", "_")
    if name not in found:
        print(f"megamf: there is no job {words[0]!r}; jobs: {', '.join(found)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"megamf {words[0]}"
    module = importlib.import_module(f"megamf.tools.{name}")
    return run(module.main, words[1:])


if __name__ == "__main__":
    raise SystemExit(main())
