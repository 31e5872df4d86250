"""Tables of measured numbers, made from committed results only: a short one in the README, all in docs/benchmarks."""

import json
from pathlib import Path
from typing import Any

from megamf.errors import UserError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# What the README shows of a suite: names that end so. Of a suite that is not here it shows everything.
HEADLINES = {
    "cpu": ("_vs_sdpa", "_vs_sdpa_t4096", "_vs_gemm", "exhaustion_speedup", "_vs_copy", "experts_vs_dense", "train_mfu",
            "train_tokens_per_second", "_memory_ratio"),
    "comm": ("tokens_per_second", "comm_share"),
    "compile": ("triton_kernels", "cuda_sources", "beyond_limits", "_spills"),
    "plan": ("order_kept", "rank_correlation", "memory_worst"),
}  # fmt: skip


def render(result: dict[str, Any], endings: tuple[str, ...] = ("",)) -> str:
    """Markdown of one result as `Result.tree` gives it, of figures whose names have one of the `endings`."""
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
        if not name.endswith(endings):
            continue
        value = "not measured" if result[name] is None else f"{result[name]:.4g}"
        lines.append(f"| `{name}` | {value} | {text} |")
    return "\n".join(lines)


def update(readme: str, results: list[dict[str, Any]]) -> str:
    """`readme` with the block between the markers replaced. Raises UserError where the markers are missing."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the README has no block between {BEGIN} and {END} to put the numbers in")
    short = [render(result, HEADLINES.get(result["suite"], ("",))) for result in results]
    return "\n\n".join([head + BEGIN, *short, END + tail])


def whole(results: list[dict[str, Any]]) -> str:
    """The page with every figure of every suite."""
    return "\n\n".join(["# Benchmarks", "Made by `megamf bench --readme README.md`.", *map(render, results)]) + "\n"


def committed(folder: Path) -> list[dict[str, Any]]:
    """All results in `folder`, by file name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
