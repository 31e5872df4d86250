"""What a trained model is worth: perplexity, bits per byte, and text from it."""

from megamf.evaluate.load import load_model

__all__ = ["load_model"]
