"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """Bad input: a config, a data row, a checkpoint, an adapter, a token id.

    The message says what is wrong, where, and how to fix it. `phi3-jax` prints it without a
    traceback and exits with code 2.
    """
