"""The errors that are told in one clear paragraph. Those that are the user's to mend end a job with exit code 2."""


class TrainingFailed(RuntimeError):
    """Training cannot go on, and the message says why and what to do. Jobs answer with that paragraph and code 1."""


class UserError(ValueError):
    """Wrong usage, configuration or input. The message says what was wrong (both values), where, and what to do."""
