"""The two exceptions that a command line turns into a single line of text."""


class ConfigError(ValueError):
    """An option, a data file or a run folder is not usable: the message says what was expected and what to do."""


class RunError(RuntimeError):
    """A run that began well cannot go on: the message says why, and how to go on from its last checkpoint."""
