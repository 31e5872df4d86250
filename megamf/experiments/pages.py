"""What the pages of all experiments share: tables, and the part that is written by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

READING_BEGIN, READING_END = "<!-- reading: begin -->", "<!-- reading: end -->"


def reading(page: Path) -> str:
    """The part of a page that is written by hand and kept, empty on a new page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if READING_BEGIN in text and READING_END in text:
        return text[text.index(READING_BEGIN) : text.index(READING_END) + len(READING_END)]
    return f"{READING_BEGIN}\n{READING_END}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [" | ".join(header), " | ".join(["---"] + ["---:"] * (len(header) - 1))]
    return "\n".join(f"| {line} |" for line in lines + [" | ".join(str(cell) for cell in row) for row in rows])
