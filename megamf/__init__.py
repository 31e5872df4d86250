"""megamf: distributed pretraining of ModuleFormer language models, and tools for the modules they are made of."""

__version__ = "0.1.0"
