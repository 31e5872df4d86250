"""The errors that are the user's to mend; every job answers them with one clear paragraph and exit code 2."""


class UserError(ValueError):
    """Wrong usage, configuration or input. The message says what was wrong (both values), where, and what to do."""
