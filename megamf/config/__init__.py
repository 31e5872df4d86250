"""The run configuration: validated before anything starts, refused with both values where it contradicts itself."""

from megamf.config.base import ConfigError
from megamf.config.load import dump, load_config, preset_names, to_tree, validate
from megamf.config.model import ModelConfig
from megamf.config.run import RunConfig

__all__ = [
    "ConfigError",
    "ModelConfig",
    "RunConfig",
    "dump",
    "load_config",
    "preset_names",
    "to_tree",
    "validate",
]
