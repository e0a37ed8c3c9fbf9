"""The regular expressions of a config: whether PEFT could use them, and how long they take."""

from __future__ import annotations

import re
import signal
import sys
import threading
from types import FrameType

# Seconds for the names below, which take less than a thousandth of one. An expression such as
# `(.+)+x` takes twice as long with every letter of a name that it does not match.
TIME_LIMIT = 2.0
_NAMES = ("model.layers.31.self_attn.q_proj", "model.layers.31.mlp.gate_up_proj.no_such_name")


class _TooLong(Exception):
    """An expression ran out of time."""


def expression_problem(expression: object, form: str = "{}") -> str:
    """Why an expression could not be used; empty if it could.

    Args:
        expression: from a config.
        form: what is put around it, which stands in the place of `{}`.
    """
    if not isinstance(expression, str):
        return "it is not text"
    try:
        re.compile(expression)
        # Flags such as (?i) are allowed at the beginning only.
        pattern = re.compile(form.replace("{}", expression))
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    if _takes_too_long(pattern):
        return f"it takes over {TIME_LIMIT:g} s for one name; put no repetition into another"
    return ""


def _takes_too_long(pattern: re.Pattern[str]) -> bool:
    """Try the names; in the main thread only, which gets the alarm."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return False

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    former = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        for name in _NAMES:
            pattern.fullmatch(name)
    except _TooLong:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, former)
    return False
