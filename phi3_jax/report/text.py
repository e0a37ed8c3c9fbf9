"""Numbers and text as people read them, in the terminal and in reports."""

from __future__ import annotations

import html
import math

from phi3_jax.errors import printable


def clock(seconds: float) -> str:
    """A duration as `M:SS`, or `H:MM:SS` from an hour on."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def fixed(value: float, digits: int) -> str:
    """With `digits` decimals, or as a power of ten where these would say little."""
    if value and math.isfinite(value) and not 1e-2 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{digits}f}"


def three_digits(value: float) -> str:
    """With at least three digits: `0.123`, `12.3`, `1,234`."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def escape(text: object) -> str:
    """Text for HTML, in which control characters are visible."""
    return html.escape(printable(str(text)))
