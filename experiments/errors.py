"""Exceptions that a command line prints as one line of text instead of a traceback."""


class ConfigError(ValueError):
    """Raised for an option, a data file or a run folder that cannot be used: says what was expected and what to do."""


class RunError(RuntimeError):
    """Raised when a run that has started cannot continue: says why, and how to resume from its last checkpoint."""
