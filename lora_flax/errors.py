"""The one exception of this package."""


class LoraError(ValueError):
    """Bad input that the caller can mend: a config, a target, an adapter folder.

    The message says what is wrong, where, and what there is instead.
    """
