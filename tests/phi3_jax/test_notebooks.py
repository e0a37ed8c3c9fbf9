"""The notebooks run: their Python and their commands, a tiny model in place of a real one."""

from __future__ import annotations

import json
import shlex

import pytest

from phi3_jax.cli.main import main
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Cells that need a network, a notebook's own Python, or a TPU.
SKIPPED = {"install", "tpu"}


def code_cells(notebook) -> list[tuple[set[str], str]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        (set(cell["metadata"].get("tags", [])), "".join(cell["source"]))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def run(source: str, scope: dict) -> None:
    """A cell of Python, or of one shell command as IPython reads it."""
    if not source.startswith("!"):
        exec(compile(source, "cell", "exec"), scope)
        return
    command = source[1:].replace("\\\n", " ").format(**scope)
    program, *arguments = shlex.split(command)
    assert program == "phi3-jax"
    smaller = ["data.max_samples=32", "data.max_test_samples=4"]
    if arguments[0] == "train":
        smaller += ["mesh.data=1", "training.report_to=none"]  # not all of the eight devices
    if arguments[0] in ("train", "preview"):
        arguments += smaller
    assert main(arguments) == 0, command


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(notebook, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "__main__"}
    for tags, source in code_cells(notebook):
        if not tags & SKIPPED:
            run(source, scope)
        if "parameters" in tags:
            assert set(scope) >= {"MODEL", "STEPS", "ANSWER"}
            scope |= {"MODEL": str(checkpoint), "STEPS": 2, "ANSWER": 4}
    shown = capsys.readouterr().out
    assert "held-out loss" in shown and "\nafter: " in shown


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(notebook):
    raw = json.loads(notebook.read_text(encoding="utf-8"))
    assert raw["nbformat"] == 4 and len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"])
    for cell in raw["cells"]:
        assert cell["cell_type"] == "markdown" or (
            cell["outputs"] == [] and cell["execution_count"] is None
        )


def test_commands_of_skipped_cells_exist():
    """What no test runs at least names commands and extras that exist."""
    for notebook in NOTEBOOKS:
        for tags, source in code_cells(notebook):
            for line in source.splitlines():
                if tags & SKIPPED and line.startswith("!phi3-jax "):
                    with pytest.raises(SystemExit) as stop:
                        main([line.split()[1], "--help"])
                    assert stop.value.code == 0
