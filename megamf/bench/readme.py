"""The table of measured numbers in the README, made from committed results only."""

import json
from pathlib import Path
from typing import Any

from megamf.errors import UserError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def render(result: dict[str, Any]) -> str:
    """Markdown of one result as `Result.tree` gives it."""
    where = result["machine"]
    hardware = where["gpu"] if "gpu" in where else f"{where['cpu']}, {where['threads']} threads"
    lines = [
        f"`megamf bench --suite {result['suite']}`, {result['date'][:10]}, {hardware}, "
        f"torch {where['torch']}, load {where['load_before']} before the run:",
        "",
        "| figure | value | |",
        "|---|---:|---|",
    ]
    for name, text in result["meaning"].items():
        value = "not measured" if result[name] is None else f"{result[name]:.4g}"
        lines.append(f"| `{name}` | {value} | {text} |")
    return "\n".join(lines)


def update(readme: str, results: list[dict[str, Any]]) -> str:
    """`readme` with the block between the markers replaced. Raises UserError where the markers are missing."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the README has no block between {BEGIN} and {END} to put the numbers in")
    return "\n\n".join([head + BEGIN, *map(render, results), END + tail])


def committed(folder: Path) -> list[dict[str, Any]]:
    """All results in `folder`, by file name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
