"""What every configuration section shares: unknown keys are refused, values are checked, nothing is coerced silently."""

from pydantic import BaseModel, ConfigDict

from megamf.errors import UserError


class ConfigError(UserError):
    """A mistake in the user's configuration or command line; jobs answer it with exit code 2."""


class Section(BaseModel):
    """A configuration section. Unknown keys are errors, and defaults are validated like given values."""

    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True)
