"""Two programs that are compared, each run in processes of its own, in turn."""

from __future__ import annotations

import json
import subprocess
import sys


def run_in_turn(sides: tuple[str, ...], rounds: int) -> dict[str, list[dict]]:
    """Runs this script once a side and round with `--side SIDE`: the JSON that it prints last."""
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, *sys.argv, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    return runs
