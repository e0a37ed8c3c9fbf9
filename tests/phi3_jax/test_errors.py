"""What may appear in a message."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.errors import at_most_ten, machine_problem, printable


def test_a_terminal_gets_no_control_characters():
    assert printable("a\tb\nc é 漢 😀") == "a\tb\nc é 漢 😀"
    hostile = "\x1b]0;title\x07 \x1b[2J \r \x9b31m \u202e \x7f \x00 \ud800"
    shown = printable(hostile)
    assert shown == (r"\x1b]0;title\x07 \x1b[2J \r \x9b31m \u202e \x7f \x00 \ud800")
    shown.encode()


def test_lists_are_cut_at_ten():
    names = [str(n) for n in range(12)]
    assert at_most_ten(names[:10]) == names[:10]
    assert at_most_ten(names) == [*names[:10], "and 2 more"]
    assert at_most_ten(["x" * 5000]) == ["x" * 1000 + "..."]


def test_limits_of_the_machine(tmp_path):
    """What Python and JAX raise about paths and memory is said in a line."""
    (tmp_path / "loop").symlink_to("loop")
    limits = {
        "a symbolic link leads back to itself": lambda: (tmp_path / "loop").resolve(),
        "that user has no home directory here": lambda: Path("~nobody-here/x").expanduser(),
        "a path has a null character": lambda: open("a\0"),
        "not enough memory \\(Unable to allocate": lambda: np.zeros(2**55),
        "not enough memory \\(Out of memory allocating": lambda: jnp.zeros(2**60, "int8"),
        "not enough memory \\(out of memory": lambda: bytes(2**62),
    }
    for said, fail in limits.items():
        with pytest.raises((RuntimeError, ValueError, MemoryError)) as error:
            fail()
        assert re.search(said, machine_problem(error.value))
    assert machine_problem(RuntimeError("a mistake")) is None
    backend = "Unable to initialize backend 'foo': Backend 'foo' is not known."  # of JAX
    assert machine_problem(RuntimeError(backend)) == f"JAX_PLATFORMS: {backend}"
