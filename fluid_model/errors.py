"""The one exception a user is meant to read."""


class ConfigError(ValueError):
    """A setting, path or file that cannot work. The message names the value and the way out, on one line."""
