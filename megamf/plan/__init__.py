"""Sizes, FLOPs and memory of a run, known before it starts."""
