"""Rank grid, token dispatch between ranks, and the DeepSpeed glue."""
