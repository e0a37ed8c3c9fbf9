"""Multi-process runs: how processes find each other, and what the first does for all.

Every process runs the same program over one mesh of all devices. Only the first reads and writes
the run's folder, so it does not need shared storage; it broadcasts what it finds there, or what
went wrong, to the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from phi3_jax.errors import UserError
from phi3_jax.sharding.meeting import PeerError, Peers, split_address
from phi3_jax.sharding.relay import start_relay

T = TypeVar("T")

# How long an exiting process waits for the others; the wait is only this long if one failed.
SHUTDOWN_SECONDS = 30
_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(timeout: float, report: Callable[[str], None]) -> Peers:
    """Join this process to a multi-process run; call before JAX touches a device.

    On TPU pods, GKE, SLURM and Open MPI, each process detects its rank from its environment
    (`jax.distributed.initialize`). Elsewhere three environment variables give it:
    JAX_COORDINATOR_ADDRESS (`HOST:PORT` of the first process), JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    Args:
        timeout: seconds within which all processes must come.
        report: prints a line: which processes are missing, once a minute; which one died.

    Returns:
        The other processes, not watched yet (`Peers.together`).

    Raises:
        UserError: the variables are missing or contradict those of another process.
        PeerError: the other processes do not come.
    """
    given = {name: os.environ.get(name) for name in (_COUNT, _ID)}
    try:
        count, number = (None if value is None else int(value) for value in given.values())
    except ValueError:
        raise UserError(f"{given}: both must be integers") from None
    try:
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get(_ADDRESS), count, number, None, None, int(timeout)
        )
        if address is None or count is None or number is None:
            raise ValueError("nothing says which process this is.")
        if not 0 <= number < count:
            raise UserError(f"{_ID} {number} must be from 0 to {count - 1}, as {_COUNT} is {count}")
        peers = Peers(address, count, number, report)
        peers.meet(timeout)
        # On CPUs, Gloo matches messages by their order alone: a program that starts while another
        # one runs may exchange with that of another process. It waits for the device instead.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        service = address
        if number:
            service = start_relay(*split_address(address)) or address
            # A proxy of the site would not reach the relay.
            direct = os.environ.get("no_proxy"), "127.0.0.1"
            os.environ["no_proxy"] = ",".join(filter(None, direct))
        jax.distributed.initialize(
            service,
            count,
            number,
            local_device_ids=devices,
            initialization_timeout=int(timeout),
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (UserError, PeerError):
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes of the run: {str(error).strip().splitlines()[0]} If "
            f"no cluster gives this process its rank, set {_ADDRESS}, {_COUNT} and {_ID}"
        ) from None
    return peers


def is_asked_for() -> bool:
    """Whether the environment names a coordinator."""
    return _ADDRESS in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes; always true for a single process."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Call the function on the first process and return its result on all of them.

    Args:
        function: returns a JSON value; not called on the other processes.

    Raises:
        UserError: if the function raised one; raised on every process.
    """
    if jax.process_count() == 1:
        return function()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": function()}
        except UserError as error:
            said = {"error": str(error)}
    said = json.loads(_texts_of_all(json.dumps(said))[0])
    if "error" in said:
        raise UserError(said["error"])
    return cast(T, said["value"])


def on_all(function: Callable[[], T]) -> T:
    """Call the function on every process; return this process's result once all have succeeded.

    Args:
        function: must not wait for another process.

    Raises:
        UserError: if the function raised one on any process, so none waits for one that exited.
    """
    if jax.process_count() == 1:
        return function()
    error, value = "", None
    try:
        value = function()
    except UserError as raised:
        error = str(raised)
    for number, other in enumerate(_texts_of_all(error)):
        if other:
            raise UserError(error or f"process {number}: {other}")
    return cast(T, value)


def require_same(what: str) -> None:
    """Raise UserError on every process unless they all pass the same value.

    Args:
        what: a description of what must match, with its digest.
    """
    if jax.process_count() == 1:
        return
    for number, other in enumerate(_texts_of_all(what)):
        if other != what:
            raise UserError(f"the processes must agree: {what} here, {other} on process {number}")


def from_all(value: T) -> list[T]:
    """Every process's value, in the order of the processes; all of them must call this.

    Args:
        value: a JSON value.
    """
    if jax.process_count() == 1:
        return [value]
    return [cast(T, json.loads(text)) for text in _texts_of_all(json.dumps(value))]


def _texts_of_all(text: str) -> list[str]:
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size)).reshape(-1)
    padded = np.zeros(max(1, *sizes), np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def first_to_all(array: np.ndarray) -> np.ndarray:
    """Broadcast the first process's array; the others pass one of the same shape and dtype."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def tell(key: str, text: str) -> None:
    """Leave a text for the other processes; may be called in any thread.

    Args:
        key: never used before in this run of the program.
        text: what they get from `hear`.
    """
    _coordinator().key_value_set(key, text)


def hear(key: str, seconds: float) -> str:
    """The text that a process leaves under a key, once it is there; may be called in any thread.

    Raises:
        UserError: it does not come in time.
    """
    try:
        text: str = _coordinator().blocking_key_value_get(key, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no word from another process ({reason})") from None
    return text


def _coordinator() -> Any:
    assert global_state.client is not None  # there are several processes
    return global_state.client


def agree_to_stop(received: list[int], step: int) -> bool:
    """Whether the run should stop here; the answer is the same on all processes.

    A process of its own stops when it receives a signal. With several, signals may arrive at
    different times; JAX's preemption service, which then handles SIGTERM, picks a step that all of
    them reach.

    Args:
        received: signals that this process received.
        step: how often this was called in the run, the same on all processes.
    """
    if not jax.distributed.is_initialized():
        return bool(received)
    return multihost_utils.reached_preemption_sync_point(step)
