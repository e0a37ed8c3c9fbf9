"""What may appear in a message."""

from phi3_jax.errors import at_most_ten, printable


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
