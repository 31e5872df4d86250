"""From text to batches: tokenizers, indexed datasets, weighted blends."""
