"""What the assembler of GPU kernels reports."""

import re


def usage(report: str) -> list[tuple[int, int]]:
    """(registers, bytes of spill stores) of every kernel in a report of `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill stores", report)
    return [(int(a), int(b)) for a, b in zip(registers, spills, strict=True)]
