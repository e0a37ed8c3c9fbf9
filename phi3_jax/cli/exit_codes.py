"""Exit codes of the `phi3-jax` command."""

OK = 0
# The run had to stop: a loss or gradient was not finite.
NON_FINITE = 1
# Something the user can fix: a config, a file, an argument.
BAD_INPUT = 2
# As shells report a process that a signal ended: 128 plus the signal's number.
SIGNAL = 128
INTERRUPTED = 130
