"""The one exception a user can mend."""


class UserError(ValueError):
    """Bad input: a config, a data row, a checkpoint, an adapter, a token id.

    The message says what is wrong, where it stands and what to do about it. `train.py` prints it
    without a traceback and exits with code 2.
    """
