"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio, and MLflow."""

from __future__ import annotations

import importlib
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.sharding.processes import on_first

# What MLflow allows in the name of a metric.
_NOT_IN_NAMES = re.compile(r"[^\w\-./ :]")
# By default MLflow asks a server that does not answer for several minutes.
_MLFLOW_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# How to send the values of a step, and how to finish.
Opened = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]


class Tracker(Protocol):
    """Takes the metrics of a run; opened for one run."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Send the finite values of a step."""

    def close(self) -> None:
        """Finish the run there."""


class TensorBoard:
    """Scalars in TensorBoard's event files, written at once.

    tensorboardX's `SummaryWriter` leaves that to a thread, which dies when the disk is full; from
    then on it would block the run.

    Args:
        folder: the log folder, created if missing.
        purge_step: TensorBoard drops earlier events from this step on.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._folder = Event, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=purge_step, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step.

        Raises:
            OSError: they cannot be written.
        """
        from tensorboardX.summary import scalar

        try:
            for name, value in values.items():
                summary = scalar(name, value)
                event = self._event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            error.filename = str(self._folder)
            raise

    def close(self) -> None:
        """Close the file; what a full disk did not take has been reported before."""
        with suppress(OSError):
            self._writer.close()


class Service:
    """A tracker behind a client library, whose failure does not end the run.

    Args:
        name: its name in `report_to`.
        log: sends the values of a step.
        finish: ends the run there.
        warn: prints a line about a failure.
    """

    def __init__(
        self,
        name: str,
        log: Callable[[int, dict[str, float]], Any],
        finish: Callable[[], Any],
        warn: Callable[[str], None],
    ):
        self._name, self._log, self._finish, self._warn = name, log, finish, warn
        self._failed = False

    def add(self, step: int, values: dict[str, float]) -> None:
        """Send the values of a step, unless an earlier one failed."""
        self._try(lambda: self._log(step, values))

    def close(self) -> None:
        """End the run there, unless it failed before."""
        self._try(self._finish)

    def _try(self, action: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # each client raises its own types
            self._failed = True
            self._warn(
                f"warning: {self._name} takes no more metrics ({_first_line(error)}); "
                "metrics.jsonl has all of them"
            )


def open_tracker(
    name: str, config: RunConfig, directory: Path, first_step: int, warn: Callable[[str], None]
) -> Tracker:
    """Open one of `training.report_to`.

    Args:
        name: `tensorboard`, `wandb`, `trackio` or `mlflow`.
        config: the run's config.
        directory: the run's output folder.
        first_step: the step that the run continues from; 0 starts a new run in the tracker.
        warn: prints a line about one that fails later.

    Raises:
        UserError: it cannot be used.
    """
    if name == "tensorboard":
        # A new run replaces what an attempt left that was killed before its first checkpoint.
        return TensorBoard(directory / "tensorboard", first_step + 1 if first_step else 0)
    opener = {"wandb": _open_wandb, "trackio": _open_trackio, "mlflow": _open_mlflow}[name]
    try:
        log, finish = opener(config, directory, first_step)
    except UserError:
        raise
    except Exception as error:  # each client raises its own types
        raise _unusable(name, _first_line(error)) from None
    return Service(name, log, finish, warn)


def _open_wandb(config: RunConfig, directory: Path, first_step: int) -> Opened:
    run = _import("wandb").init(
        project=config.training.project,
        name=_run_name(config, directory),
        config=config.model_dump(),
        dir=str(directory),
        id=_kept_id(directory / "wandb_id", first_step),
        resume="allow",
        reinit="create_new",  # By default, the members of a sweep would all be the first one's run.
    )
    return lambda step, values: run.log(values, step=step), run.finish


def _open_trackio(config: RunConfig, directory: Path, first_step: int) -> Opened:
    # Trackio continues a run by its name, which must be of this run alone.
    name = f"{_run_name(config, directory)}-{_kept_id(directory / 'trackio_id', first_step)}"
    run = _import("trackio").init(
        project=config.training.project or "phi3-jax",
        name=name,
        config=config.model_dump(),
        resume="allow",
        embed=False,
    )
    return lambda step, values: run.log(values, step=step), run.finish


def _open_mlflow(config: RunConfig, directory: Path, first_step: int) -> Opened:
    mlflow = _import("mlflow")
    os.environ.setdefault(_MLFLOW_RETRIES, "3")
    client = mlflow.MlflowClient()
    file = directory / "mlflow_id"
    if first_step and file.exists():
        run_id = file.read_text(encoding="utf-8")
        client.update_run(run_id, status="RUNNING")
    else:
        experiment = _experiment(client, config.training.project)
        run = client.create_run(experiment, run_name=_run_name(config, directory))
        run_id = run.info.run_id
        lora_flax.write_atomically(file, run_id)
        for section, values in config.model_dump().items():
            for key, value in values.items():
                client.log_param(run_id, f"{section}.{key}", str(value)[:6000])

    def log(step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        names = {name: _NOT_IN_NAMES.sub("_", name) for name in values}
        metrics = [
            mlflow.entities.Metric(names[name], value, now, step) for name, value in values.items()
        ]
        client.log_batch(run_id, metrics=metrics)

    return log, lambda: client.set_terminated(run_id)


def _experiment(client: Any, project: str | None) -> str:
    """The id of the MLflow experiment that a project is, created if missing."""
    if project is None and (known := os.environ.get("MLFLOW_EXPERIMENT_ID")):
        return known
    name = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def _run_name(config: RunConfig, directory: Path) -> str:
    return config.training.run_name or directory.resolve().name


def _kept_id(path: Path, first_step: int) -> str:
    """The run's id in a tracker; a resumed run continues its own curves."""
    if not first_step or not path.exists():
        lora_flax.write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8")


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that cannot be used, before anything is loaded; on the first process.

    Raises:
        UserError: one is not installed, has no valid key or token, or its server does not answer.
    """
    checks = {"wandb": _check_wandb, "trackio": _check_trackio, "mlflow": _check_mlflow}
    for name in report_to:
        if name in checks:
            on_first(checks[name])


def _check_wandb() -> None:
    wandb = _import("wandb")
    if wandb.setup().settings.mode != "online":
        return
    try:
        problem = "" if wandb.login(prompt=False) else "no API key"
    except wandb.errors.Error as error:
        problem = _first_line(error)
    if problem:
        remedy = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
        raise _unusable("wandb", problem, remedy)


def _check_trackio() -> None:
    _import("trackio")
    import huggingface_hub

    if os.environ.get("TRACKIO_SPACE_ID") and huggingface_hub.get_token() is None:
        remedy = "run `hf auth login`, or set HF_TOKEN"
        raise _unusable("trackio", "TRACKIO_SPACE_ID is set, but there is no token", remedy)


def _check_mlflow() -> None:
    mlflow = _import("mlflow")
    before = os.environ.get(_MLFLOW_RETRIES)
    os.environ[_MLFLOW_RETRIES] = before or "0"
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:  # of the client, its HTTP library, or the database's
        remedy = "set MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise _unusable("mlflow", _first_line(error), remedy) from None
    finally:
        if before is None:
            del os.environ[_MLFLOW_RETRIES]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"training.report_to: {name} is not installed: pip install 'phi3-jax[{name}]'"
        ) from None


def _unusable(name: str, problem: str, remedy: str = "") -> UserError:
    end = f": {remedy}" if remedy else ""
    return UserError(f"training.report_to: {name} cannot be used ({problem}){end}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
