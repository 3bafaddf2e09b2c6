"""The one exception that a command line turns into a single line of text."""


class ConfigError(ValueError):
    """An option, a data file or a run folder is not usable: the message says what was expected and what to do."""
