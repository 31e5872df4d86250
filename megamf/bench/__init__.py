"""Benchmark suites: figures measured side by side in one run, with the machine they were measured on."""

from megamf.bench.suite import Figure, Result, interleaved, machine

__all__ = ["Figure", "Result", "interleaved", "machine"]
