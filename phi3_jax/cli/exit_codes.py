"""Exit codes of the `phi3-jax` command."""

OK = 0
# The run stopped because a loss or gradient was not finite.
NON_FINITE = 1
# An error the user can fix: in a config, a file or an argument.
BAD_INPUT = 2
# How shells report a process ended by a signal: 128 plus the signal number.
SIGNAL = 128
INTERRUPTED = 130
