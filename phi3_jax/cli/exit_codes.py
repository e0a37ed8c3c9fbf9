"""Exit codes of the `phi3-jax` command."""

OK = 0
# The run stopped because a loss or gradient was not finite, or every step was skipped for that.
NON_FINITE = 1
# An error the user can fix: in a config, a file, an argument, or a full disk.
BAD_INPUT = 2
# Another process of the run did not come, or died: start all of them again, with --resume=auto.
PEER_LOST = 3
# A bucket stopped answering for long: start again later, with --resume=auto.
OUTAGE = 4
# How shells report a process ended by a signal: 128 plus the signal number. SIGHUP is 129, SIGINT
# 130, SIGTERM 143.
SIGNAL = 128
