"""The exceptions a user is meant to read: one line, no traceback."""


class ConfigError(ValueError):
    """A setting, path or file that cannot work. The message names the value and the way out, on one line."""


class RunError(RuntimeError):
    """Work that could not be finished through no fault of the settings. What is done is kept."""
