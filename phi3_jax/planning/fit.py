"""Whether a run fits the device that it is planned on, and with which batch."""

from __future__ import annotations

from collections.abc import Callable

import jax

from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.remat import describe
from phi3_jax.planning.plan import Plan, plan
from phi3_jax.planning.report import GIB
from phi3_jax.planning.search import largest
from phi3_jax.planning.suggest import Suggestion, batch_keys
from phi3_jax.platform import host_memory

# JAX's names of TPU chips, in the notation of topologies.
_CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def this_topology() -> str | None:
    """The devices here, as `phi3-jax plan` names them; None where it cannot plan for them."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return "cpu:1"
    chip = _CHIPS.get(devices[0].device_kind)
    if chip is None:
        return None
    sizes = [1 + max(places) for places in zip(*(device.coords for device in devices), strict=True)]
    axes = sizes[:2] if chip in ("v5e", "v6e") else sizes
    return f"{chip}:{'x'.join(map(str, axes))}"


def fit(
    config: RunConfig,
    network: Phi3Config,
    topology: str | None,
    say: Callable[[Plan], None] = lambda plan: None,
) -> Suggestion:
    """Compile the run's step, and find a batch that fits if it does not.

    Args:
        config: the run's config.
        network: the base model's config.
        topology: as in `plan`; None if it is not known.
        say: called with each candidate that was compiled.
    """
    if topology is None:
        return Suggestion(
            "memory: unknown for this device; `phi3-jax plan` and --topology know TPUs and cpu:N"
        )
    try:
        planned = plan(config, network, topology)
    except UserError as error:
        return Suggestion(f"memory: not planned: {error}")
    chip = planned.chip
    # Simulated devices share the host's memory.
    memory = host_memory() // planned.chips if chip is None else int(chip.memory * GIB)
    rows = f"{planned.length} tokens x {config.training.per_device_train_batch_size} rows"
    if planned.fits and planned.peak <= memory:
        return Suggestion(
            f"memory: {planned.peak / GIB:.2f} of {memory / GIB:.2f} GiB on {topology} for {rows}, "
            "as compiled"
        )
    text = f"memory: {rows} do not fit {memory / GIB:.2f} GiB on {topology}"
    return (
        _smaller(config, planned, memory, text)
        if chip is None
        else _search(config, network, topology, say, text)
    )


def _search(
    config: RunConfig,
    network: Phi3Config,
    topology: str,
    say: Callable[[Plan], None],
    text: str,
) -> Suggestion:
    found = largest(config, network, topology, say, quick=True)
    if found is None:
        return Suggestion(
            f"{text}, nor does a single row: shard the weights (mesh.fsdp) or quantize them "
            "(model.quantization)"
        )
    fitting = found.rows // (found.mesh["data"] * found.mesh["fsdp"])
    remat = [f"training.gradient_checkpointing={str(found.remat != 'none').lower()}"]
    if found.remat != "none":
        policy = found.remat if isinstance(found.remat, str) else list(found.remat)
        remat.append(f"training.remat_policy={policy}")
    return Suggestion(
        f"{text}; {fitting} rows do, with remat {describe(found.remat)}: "
        f"{found.peak / GIB:.2f} GiB, as compiled",
        (*batch_keys(_rows(config), fitting), *remat),
    )


def _smaller(config: RunConfig, planned: Plan, memory: int, text: str) -> Suggestion:
    """The batch by proportion: a host has no limit that a compiler would report."""
    fixed = planned.peak - planned.activations
    each = planned.activations / config.training.per_device_train_batch_size
    fitting = int((memory - fixed) / each)
    if fitting < 1:
        return Suggestion(f"{text}, nor does a single row: use a smaller model or shorter rows")
    return Suggestion(
        f"{text} ({planned.peak / GIB:.2f} GiB, as compiled); in proportion, {fitting} rows do",
        tuple(batch_keys(_rows(config), fitting)),
    )


def _rows(config: RunConfig) -> int:
    """Rows of a step on one device."""
    training = config.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps
