"""Pushes of a run's adapter to the hub: at the end, and at its checkpoints while it trains."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from phi3_jax.checkpoint.push import push_folder
from phi3_jax.config.training import TrainingConfig
from phi3_jax.errors import UserError
from phi3_jax.sharding.processes import is_first

# How long the end of a run waits for the push of a checkpoint.
PATIENCE_SECONDS = 600.0


class Pushes:
    """What a run pushes, from its first process only. A push that fails never fails the run.

    A checkpoint is pushed by a thread of its own. While it is busy, the newest checkpoint waits,
    and an older one that waits is left out. The thread does not keep an interrupted run alive.

    Args:
        config: the run's section `training`.
        run: the run's folder, for messages.
        say: prints a line.
    """

    def __init__(self, config: TrainingConfig, run: Path, say: Callable[[str], None]) -> None:
        self._config, self._run, self._say = config, run, say
        self._thread: threading.Thread | None = None
        self._waiting: tuple[int, tempfile.TemporaryDirectory[str]] | None = None
        self._lines: list[str] = []
        self._lock = threading.Lock()

    @property
    def takes_checkpoints(self) -> bool:
        """Whether checkpoints are pushed too."""
        return self._config.push_to_hub and self._config.hub_strategy == "every_save"

    def checkpoint(self, step: int, write: Callable[[Path], object]) -> None:
        """Push the adapter of a checkpoint in the background.

        Args:
            step: the checkpoint's step.
            write: writes the adapter to a folder, on the first process; called on all of them.
        """
        # Deleted when it was pushed, or left out, or at the end of the process.
        folder = tempfile.TemporaryDirectory(prefix="phi3-jax-push-", ignore_cleanup_errors=True)
        written = True
        try:
            write(Path(folder.name))
        except (UserError, OSError) as error:  # such as a full disk
            written = False
            self._say(f"warning: the adapter of step {step} cannot be written and pushed ({error})")
        if not is_first() or not written:
            folder.cleanup()
            return
        self.report()
        with self._lock:
            left_out, self._waiting = self._waiting, (step, folder)
            if self._thread is None:
                self._thread = threading.Thread(target=self._push_waiting, daemon=True)
                self._thread.start()
        if left_out is not None:
            left_out[1].cleanup()

    def last(self, adapter: Path) -> None:
        """Push the finished adapter, after a checkpoint's push that is under way."""
        if not self._config.push_to_hub or not is_first():
            return
        with self._lock:
            left_out, self._waiting, thread = self._waiting, None, self._thread
        if left_out is not None:
            left_out[1].cleanup()
        if thread is not None:
            thread.join(PATIENCE_SECONDS)
        self.report()
        again = f"`phi3-jax push {adapter} {self._config.hub_model_id}`"
        self._say(self._push(adapter, "the adapter", None, again))

    def report(self) -> None:
        """Print what became of the pushes since the last report."""
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            self._say(line)

    def _push_waiting(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                (step, folder), self._waiting = self._waiting, None
            again = (
                f"`phi3-jax export --run {self._run} --step {step} --format peft --output FOLDER` "
                f"and `phi3-jax push FOLDER {self._config.hub_model_id}`"
            )
            what = f"the adapter of step {step}"
            line = self._push(Path(folder.name), what, f"Upload the adapter of step {step}", again)
            folder.cleanup()
            with self._lock:
                self._lines.append(line)

    def _push(self, adapter: Path, what: str, message: str | None, again: str) -> str:
        """Upload an adapter; the line to print, which says how to push it later if that failed."""
        repo = self._config.hub_model_id
        assert repo is not None  # checked with the config
        try:
            pushed = push_folder(adapter, repo, self._config.hub_private_repo, message)
            return f"pushed {what}: {pushed}"
        except UserError as error:
            return f"warning: {what} is not on the hub: {error}. Push it later with {again}"
