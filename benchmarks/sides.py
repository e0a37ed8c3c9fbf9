"""Run the sides of a comparison in turn, each in its own processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


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


class Side:
    """The calling script with `--side NAME`, kept running: it answers each request with JSON.

    The sides can then take turns step by step, after both have loaded and warmed up.
    """

    def __init__(self, name: str):
        command = [sys.executable, *sys.argv, "--side", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate()

    def ask(self, *request: Any) -> Any:
        """Send a request and return the answer; ends the script if the side died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(answer)


def serve(functions: dict[str, Any]) -> None:
    """Answer the requests of `Side.ask`: the name of a function and its arguments."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may print between the answers
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(functions[name](*arguments)), file=answers, flush=True)


def seconds_of(function: Callable, *arguments: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
