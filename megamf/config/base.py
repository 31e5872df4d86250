"""What every configuration section shares: unknown keys are refused, values checked, nothing coerced."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from megamf.errors import UserError


class ConfigError(UserError):
    """A mistake in the user's configuration or command line; jobs answer it with exit code 2."""


# Strict sections take a Path only; YAML has but text for one.
TextPath = Annotated[Path, Field(strict=False)]


class Section(BaseModel):
    """A configuration section. Unknown keys are errors, types are not converted, defaults are validated too."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, validate_assignment=True)
