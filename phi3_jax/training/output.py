"""A run's output folder: checks before the run, and the adapter written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import jax
from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.buckets import Bucket, Outage, scheme_of
from phi3_jax.checkpoint.adapters import write_quantization
from phi3_jax.checkpoint.hub import is_repo_id
from phi3_jax.checkpoint.readers import merge_first
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError, storage_problem
from phi3_jax.model.network import Phi3
from phi3_jax.platform import user_cache
from phi3_jax.report.folder import read_run
from phi3_jax.sharding.processes import from_all, is_first, on_all, on_first
from phi3_jax.training.card import write_card
from phi3_jax.training.lock import Lock, lock_folder
from phi3_jax.training.mirror import Mirror, open_mirror
from phi3_jax.training.state_files import CHECKPOINTS, STATE, Damaged, saved_steps, unfinished

# What `--resume` asks for: nothing, to continue, or to continue if there is something to continue.
Resume = bool | Literal["auto"]
T = TypeVar("T")
# Errors that stay what they are when all processes raise what one of them did.
_KINDS: dict[str, type[UserError]] = {kind.__name__: kind for kind in (Damaged, Outage)}


@dataclasses.dataclass(frozen=True)
class Output:
    """A run's output folder, held by this run.

    Attributes:
        path: the folder.
        resume: whether to continue from its last checkpoint.
        fall_back: whether an earlier checkpoint will do where the last one is damaged.
        each_writes: whether every process reaches the folder, or the bucket that it is copied to.
            Otherwise only the first process reads and writes checkpoints.
        lock: the lock of the folder; None on every process but the first.
        mirror: the bucket that the folder is copied to, if any; on other processes than the first
            only if they have a folder of their own.
    """

    path: Path
    resume: bool
    fall_back: bool
    each_writes: bool
    lock: Lock | None
    mirror: Mirror | None

    def check(self) -> None:
        """Raise UserError if another run took the folder."""
        if self.lock is not None:
            self.lock.check()

    def copy(self) -> None:
        """Copy what changed to the bucket, from the first process.

        Raises:
            UserError: the bucket does not take it.
        """
        if self.mirror is not None and is_first():
            self.mirror.push()

    def send_part(self, step: int, part: Path) -> None:
        """Copy to the bucket what another process than the first wrote of a checkpoint.

        Raises:
            UserError: the bucket does not take it.
        """
        if self.mirror is not None and not is_first():
            self.mirror.send(part, f"{_state_of(step)}/{part.name}")
            shutil.rmtree(part)

    def get_parts(self, step: int) -> None:
        """Copy from the bucket what other processes wrote of a checkpoint.

        Raises:
            UserError: the bucket cannot be read.
        """
        if self.mirror is not None and jax.process_count() > 1:
            self.mirror.get(_state_of(step))

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return (self.path / CHECKPOINTS).absolute()


def _state_of(step: int) -> str:
    return f"{CHECKPOINTS}/{step}/{STATE}"


@contextlib.contextmanager
def open_output(directory: str, resume: Resume) -> Iterator[Output]:
    """Create and lock a run's folder, on the first process only.

    Args:
        directory: `training.output_dir`.
        resume: as given to `train`.

    Raises:
        UserError: the folder cannot be used, another run holds it, it contains an earlier run and
            `resume` is false, or `resume` is true and it contains no checkpoint.
        Outage: the bucket of a run that is continued does not answer.
    """
    scheme = scheme_of(directory)
    if scheme and scheme != "gs":
        raise UserError(
            f"training.output_dir: {directory}: {scheme}:/ cannot be written; use gs://, or a "
            "local or mounted folder"
        )
    path = local_folder(directory)
    with contextlib.ExitStack() as stack:
        held: list[tuple[Lock, Mirror | None]] = []
        found = value_of(
            on_first(lambda: outcome_of(lambda: _hold(directory, path, resume, stack, held)))
        )
        lock, mirror = held[0] if held else (None, None)
        shared = _is_shared(path)
        if scheme and not shared:
            mirror = on_all(lambda: mirror or _own_mirror(directory, path))
        yield Output(path, found, resume == "auto", shared or bool(scheme), lock, mirror)


def _is_shared(path: Path) -> bool:
    """Whether all processes see what the first writes into the folder."""
    if jax.process_count() == 1:
        return True
    # Removed at the next start, like other leftovers, if this run is killed here.
    name = on_first(lambda: f".shared.{time.time_ns()}.tmp")
    on_first(lambda: (path / name).touch())
    seen = from_all((path / name).exists())
    on_first(lambda: (path / name).unlink())
    return all(seen)


def _own_mirror(url: str, path: Path) -> Mirror:
    """The bucket of another process than the first, with a folder of its own."""
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run
    return Mirror(Bucket(url), path)


def local_folder(directory: str) -> Path:
    """Where a run works: `training.output_dir`, or the local folder that is copied to a bucket."""
    if not scheme_of(directory):
        return Path(directory).expanduser()
    return user_cache() / "runs" / hashlib.sha256(directory.rstrip("/").encode()).hexdigest()[:16]


def outcome_of(function: Callable[[], T]) -> dict[str, Any]:
    """The value of a function or what it raised, for other processes, which call `value_of`."""
    try:
        return {"value": function()}
    except tuple(_KINDS.values()) as error:
        return {type(error).__name__: str(error)}


def value_of(outcome: dict[str, Any]) -> Any:
    """The value of a function that another process called.

    Raises:
        Damaged, Outage: the function raised it.
    """
    for name, kind in _KINDS.items():
        if name in outcome:
            raise kind(outcome[name])
    return outcome["value"]


def _hold(
    directory: str,
    path: Path,
    resume: Resume,
    stack: contextlib.ExitStack,
    held: list[tuple[Lock, Mirror | None]],
) -> bool:
    """Whether to resume. The lock and the mirror, added to `held`, last until the stack closes."""
    wait = resume == "auto"
    if not scheme_of(directory):
        locks: list[Lock] = []
        found = _open(path, str(path), resume, stack, locks)
        held += [(lock, None) for lock in locks]
        return found
    mirror, lock = stack.enter_context(open_mirror(directory, path, wait))
    held.append((lock, mirror))
    return _open(path, directory, resume, stack, [])


def _open(
    path: Path, name: str, resume: Resume, stack: contextlib.ExitStack, locks: list[Lock]
) -> bool:
    """Whether to resume; the lock, added to `locks`, is held until the stack closes."""
    try:
        if path.is_dir():
            locks.append(stack.enter_context(lock_folder(path, wait=resume == "auto")))
        has_checkpoints = bool(saved_steps(path / CHECKPOINTS))
        if has_checkpoints and not resume:
            raise UserError(
                f"{name} holds the checkpoints of an earlier run: pass --resume to continue it, or "
                "choose another training.output_dir"
            )
        if resume is True and not has_checkpoints:
            raise UserError(
                f"{name}: no checkpoint to resume from (--resume=auto then starts a new run)"
            )
        if not path.is_dir():
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            locks.append(stack.enter_context(lock_folder(path, wait=resume == "auto")))
        _remove_leftovers(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise UserError(f"training.output_dir: {storage_problem(error) or error}") from None
    return has_checkpoints


def _remove_empty(made: list[Path]) -> None:
    """Remove the folders of a run that was refused before it wrote anything, inner ones first."""
    with contextlib.suppress(OSError):  # it did write something
        for folder in made:
            folder.rmdir()


def _remove_leftovers(path: Path) -> None:
    """Remove what an earlier run that was killed had not finished writing."""
    folder = path / CHECKPOINTS
    if folder.is_dir():
        for left in unfinished(folder):
            shutil.rmtree(left)
    # Names of `write_atomically`: of the run, its adapter, the members of a sweep, and records.
    for pattern in (".*.tmp", "*/.*.tmp", "*/adapter/.*.tmp", f"{CHECKPOINTS}/*/run/.*.tmp"):
        for left in path.glob(pattern):
            if re.fullmatch(r"\..+\.[0-9]+\.tmp", left.name) and left.is_file():
                left.unlink()


class Trained(Protocol):
    """What is exported: a model with its adapter, its tokenizer, and the run's config."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    model: Phi3


def export_adapter(
    setup: Trained,
    config: RunConfig,
    adapter: Path,
    step: int,
    evaluations: Mapping[int, Mapping[str, float]],
    run: Path,
    record: dict[str, Any] | None = None,
) -> str | None:
    """Write the PEFT adapter with its model card and tokenizer, on the first process only.

    Args:
        setup: the run, whose model holds the trained adapter.
        config: the training config, for the card.
        adapter: folder to write.
        step: the step that is exported.
        evaluations: held-out metrics, keyed by the step they were measured after, for the card.
        run: the run's folder, for the card.
        record: the run's record so far, for the card; by default that in its folder.

    Returns:
        A line to print that names the programs that do not read this adapter as it was trained, if
        there are any.
    """
    base = setup.config.model
    exported = lora_flax.to_peft(
        setup.model,
        base_model_name_or_path=base_name(base.path),
        revision=base.revision if is_repo_id(base.path) else None,
        keep_rslora=config.peft.keep_rslora,
    )

    def write_rest() -> None:
        adapter.mkdir(parents=True, exist_ok=True)
        if (quantization := config.model.bitsandbytes) is not None:
            write_quantization(quantization, adapter)
        _write_tokenizer(setup.tokenizer, adapter)
        found = read_run(run, record)
        network = setup.model.config
        write_card(adapter, config, exported.config, step, evaluations, network, found)

    on_first(write_rest)
    # Last, ending with adapter_config.json: a folder that has it is a complete adapter.
    exported.save(adapter)
    return merge_first(exported.config)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            target = adapter / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            lora_flax.write_atomically(target, file.read_bytes())


def base_name(path: str) -> str:
    """A hub id unchanged; a folder as an absolute path, valid from any working directory."""
    return str(Path(path).expanduser().absolute()) if Path(path).expanduser().is_dir() else path
