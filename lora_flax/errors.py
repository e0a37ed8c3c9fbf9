"""The package's only exception."""


class LoraError(ValueError):
    """Bad input that the caller can fix: a config, a target, an adapter folder.

    The message says what is wrong, where, and what is available instead.
    """
