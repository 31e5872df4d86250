"""MoEfication: the feed-forward layers of a dense model become experts of neurons, a few of which serve a token.

Source: MoEfication, arXiv 2110.01786.
"""

from megamf.compress.moefication.convert import Choices, LayerReport, check, convert, sparse_layers
from megamf.compress.moefication.models import DenseBaseline, is_causal, open_model
from megamf.compress.moefication.portable.sparse_ffn import SparseFfn
from megamf.compress.moefication.save import save_checkpoint, save_hf
from megamf.compress.moefication.statistics import capture_inputs, dense_layers
from megamf.compress.moefication.training import calibrate, calibrate_layer, relufy

__all__ = [
    "Choices",
    "DenseBaseline",
    "LayerReport",
    "SparseFfn",
    "calibrate",
    "calibrate_layer",
    "capture_inputs",
    "check",
    "convert",
    "dense_layers",
    "is_causal",
    "open_model",
    "relufy",
    "save_checkpoint",
    "save_hf",
    "sparse_layers",
]
