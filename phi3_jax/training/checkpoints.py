"""Orbax checkpoints: trainable arrays, optimizer state, step, and the identity of the run.

The first process reads and writes them unsharded, whatever the mesh. The base model is not copied.
Its fingerprint is stored instead, along with the data fingerprint and every setting that affects
the arithmetic, so a resumed run either continues exactly or reports why it cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from lora_flax import on_host
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.sharding.mesh import place
from phi3_jax.sharding.processes import first_to_all, is_first, on_first
from phi3_jax.training.step import TrainState

# Keys that may change on resume: they do not affect the weights, or (paths) a fingerprint covers
# them.
FREE_KEYS = {
    "model.path",
    "model.revision",
    "data.path",
    "data.test_path",
    "data.test_split",
    "data.max_test_samples",
    "training.output_dir",
    "training.per_device_eval_batch_size",
    "training.on_nonfinite",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.load_best_model_at_end",
    "training.report_to",
    "training.run_name",
    "training.sample_prompts",
    "training.sample_max_new_tokens",
}


class Checkpoints:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`.

    Args:
        directory: the checkpoint folder.
        identity: identity of the run (`run_identity`), checked on restore.
        manager: Orbax's manager of the folder; None on every process but the first.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], manager: Any):
        self.directory, self.identity, self._manager = directory, identity, manager

    def start(self, state: TrainState, resume: bool) -> tuple[int, TrainState]:
        """Where a run or sweep starts: steps already taken, and the state after them.

        A new one starts at step 0 with the given state. A resumed one continues from the last
        checkpoint, and its metrics from the same step (see `open_metrics`).

        Args:
            state: the state before the first step, placed on the mesh.
            resume: continue from the last checkpoint.

        Raises:
            UserError: the checkpoint is damaged or belongs to a different run.
        """
        step = self.latest() if resume else None
        return (step, self.restore(step, state)) if step else (0, state)

    def latest(self) -> int | None:
        """The last saved step, or None."""

        def last() -> int | None:
            step: int | None = self._manager.latest_step()
            return step

        return on_first(last)

    def best(self) -> int | None:
        """The saved step with the lowest held-out loss, or None if none was evaluated."""

        def lowest() -> int | None:
            losses = {
                step: metrics["eval_loss"]
                for step in self._manager.all_steps()
                if (metrics := self._manager.metrics(step))
            }
            return min(losses, key=losses.__getitem__, default=None)

        return on_first(lowest)

    def save(self, step: int, state: TrainState, eval_loss: float | None) -> None:
        """Write a checkpoint; it appears under its final name only once complete.

        Args:
            step: steps taken so far.
            state: the state to save.
            eval_loss: held-out loss at this step, if evaluated.
        """
        if on_first(lambda: step in self._manager.all_steps()):
            return
        host = {}
        for name, leaf in flat_arrays(state).items():
            array = on_host(leaf)
            if self._manager is not None:
                host[name] = array
        if self._manager is None:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host),
                run=ocp.args.JsonSave(self.identity | {"step": step}),
            ),
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
        )
        self._manager.wait_until_finished()

    def restore(self, step: int, template: TrainState) -> TrainState:
        """Load the state at a step, placed like `template`.

        Raises:
            UserError: the checkpoint is damaged or belongs to a different run.
        """
        leaves = flat_arrays(template)
        found = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        on_first(lambda: found.update(self._read(step, found)))
        placed = [place(first_to_all(found[name]), leaf.sharding) for name, leaf in leaves.items()]
        state: TrainState = jax.tree.unflatten(jax.tree.structure(template), placed)
        return state

    def _read(self, step: int, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        where = self.directory / str(step)
        try:
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
            self._check(where, run["run"])
            state = ocp.args.StandardRestore(like)
            found = self._manager.restore(step, args=ocp.args.Composite(state=state))
            arrays: dict[str, np.ndarray] = found["state"]
            return arrays
        except UserError:
            raise
        except Exception as error:  # Orbax and its storage raise many types for damaged files
            first_line = str(error).strip().split("\n")[0]
            raise UserError(
                f"{where}: damaged, cannot be restored ({type(error).__name__}: {first_line}); "
                "delete that folder to resume from the previous checkpoint"
            ) from None

    def _check(self, where: Path, saved: dict[str, Any]) -> None:
        problems = []
        for name, what in (("base", "a different base model"), ("data", "different training data")):
            if saved[name] != self.identity[name]:
                problems.append(f"it was trained on {what}")
        before, now = saved["settings"], self.identity["settings"]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                problems.append(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}")
        if problems:
            raise UserError(
                f"{where}: this run cannot resume from it: {'; '.join(problems)}. Restore these "
                "settings, or start a new run in another training.output_dir"
            )


@contextmanager
def open_checkpoints(
    directory: Path, save_total_limit: int | None, identity: dict[str, Any]
) -> Iterator[Checkpoints]:
    """Open a run's checkpoints, and close them at the end.

    Args:
        directory: the checkpoint folder; created if missing, by the first process.
        save_total_limit: number of most recent checkpoints to keep, in addition to the one with
            the lowest held-out loss. None keeps all.
        identity: identity of the run (`run_identity`), checked on restore.
    """
    directory = directory.absolute()
    if not is_first():
        yield Checkpoints(directory, identity, manager=None)
        return
    policy: keep.PreservationPolicy = keep.PreserveAll()
    if save_total_limit is not None:
        best = keep.BestN(
            get_metric_fn=lambda metrics: metrics["eval_loss"],
            reverse=True,  # sorts the lowest last, and the last is kept
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = keep.AnyPreservationPolicy([keep.LatestN(save_total_limit), best])
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=lambda metrics: metrics["eval_loss"],  # without it Orbax drops the metrics
        best_mode="min",
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
        create=False,  # with several processes Orbax would wait for all of them
    )
    manager = ocp.CheckpointManager(directory, item_names=("state", "run"), options=options)
    with closing(manager):
        yield Checkpoints(directory, identity, manager)


def run_identity(config: RunConfig, base: str, data: str) -> dict[str, Any]:
    """Everything that must match for a checkpoint to belong to this run, as JSON values.

    Args:
        config: the run's config.
        base: fingerprint of the base model.
        data: fingerprint of the training examples.
    """
    settings = {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
        if f"{section}.{key}" not in FREE_KEYS
    }
    # Round-trip through JSON, which turns tuples into lists.
    settings = json.loads(json.dumps(settings))
    return {"base": base, "data": data, "settings": settings}


def flat_arrays(state: TrainState) -> dict[str, jax.Array]:
    """Arrays keyed by path: stable names, independent of Flax and optax classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    # Numbered because Orbax returns dictionaries sorted by key.
    return {
        f"{i:05d} {jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }


def saved_steps(directory: Path) -> list[int]:
    """The steps with a checkpoint, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def read_record(directory: Path, step: int) -> dict[str, Any]:
    """The identity of the run that saved a checkpoint, and its held-out loss as `eval_loss`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    where = directory / str(step)
    try:
        record: dict[str, Any] = json.loads((where / "run" / "metadata").read_bytes())
        metrics = where / "metrics" / "metrics"
        losses = json.loads(metrics.read_bytes()) if metrics.exists() else {}
        return record | {"eval_loss": losses.get("eval_loss")}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: damaged, cannot be read ({error})") from None


def read_arrays(directory: Path, step: int, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint.

    Args:
        directory: the checkpoint folder.
        step: the checkpoint's step.
        like: arrays with the expected names, shapes and dtypes.

    Raises:
        UserError: the checkpoint is damaged.
    """
    where = directory / str(step)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays: dict[str, np.ndarray] = checkpointer.restore(where / "state", like)
            return arrays
    except Exception as error:  # Orbax and its storage raise many types for damaged files
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{where}: damaged, cannot be restored ({type(error).__name__}: {first_line})"
        ) from None
