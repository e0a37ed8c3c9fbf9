"""Write the report of a run, a sweep, or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lora_flax
from phi3_jax.errors import UserError
from phi3_jax.report.folder import read_runs
from phi3_jax.report.one import run_page
from phi3_jax.report.several import comparison_page

REPORT = "report.html"


def write_report(
    folders: Sequence[Path], output: Path | None = None, price: float | None = None
) -> Path:
    """Write one HTML file about the runs in these folders.

    Args:
        folders: output folders of runs and sweeps; a sweep stands for its members.
        output: the file; by default report.html, in the only folder or else the current one.
        price: dollars per hour, in place of what the configs say.

    Returns:
        The file.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    runs = read_runs(folders)
    if output is None:
        output = folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    if len(runs) == 1:
        text = run_page(runs[0], price)
    else:
        title = folders[0].resolve().name if len(folders) == 1 else "Comparison of runs"
        text = comparison_page(runs, title, price)
    try:
        lora_flax.write_atomically(output, text)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    return output
