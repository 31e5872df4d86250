"""The ModuleFormer, for training and inference, without any process group."""

from megamf.model.cache import Cache
from megamf.model.init import expert_indices, initialise
from megamf.model.moduleformer import Backbone, ModuleFormer, Output

__all__ = ["Backbone", "Cache", "ModuleFormer", "Output", "expert_indices", "initialise"]
