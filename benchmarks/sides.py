"""Run the two sides of a comparison in turn, each in its own processes."""

from __future__ import annotations

import json
import subprocess
import sys


def run_in_turn(sides: tuple[str, ...], rounds: int) -> dict[str, list[dict]]:
    """The JSON that the calling script prints last with `--side SIDE`, for each side and round."""
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, *sys.argv, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    return runs
