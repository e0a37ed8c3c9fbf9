"""Compile the training step for a machine that is not there, and say what it takes.

The step is the one that `train.py` runs, built from shapes alone: nothing is loaded, nothing is
allocated. The compiler for TPUs comes with `pip install '.[tpu]'` and needs no TPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_flax
from phi3_jax.base import model_bytes
from phi3_jax.config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.mesh import (
    batch_sharding,
    choose_axes,
    make_mesh,
    optimizer_shardings,
    row_devices,
    state_shardings,
)
from phi3_jax.model import Phi3, Remat
from phi3_jax.programs import collective_bytes, matmul_flops
from phi3_jax.training.config import RunConfig
from phi3_jax.training.loss import chunk_width
from phi3_jax.training.optimizer import make_optimizer
from phi3_jax.training.setup import attn_implementation, loss_settings
from phi3_jax.training.step import TrainState, jit_train_step, partition, train_step

POLICIES: tuple[Remat, ...] = ("none", "dots", "full")  # the cheapest to compute first


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has: memory in GiB, bf16 FLOP/s, HBM and interconnect in bytes/s.

    From Google Cloud's pages on each TPU version; memory as the compiler reports it.
    """

    memory: float
    flops: float
    bandwidth: float
    interconnect: float


CHIPS = {
    "v4": Chip(31.75, 275e12, 1228e9, 300e9),
    "v5e": Chip(15.75, 197e12, 819e9, 200e9),
    "v5p": Chip(95.0, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25, 918e12, 1640e9, 448e9),
}
_KNOWN = "v4:2x2x1, v5e:1x1, v5e:2x4, v5p:2x2x1, v6e:4x4, cpu:8"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled step; bytes are of one chip.

    Attributes:
        topology: as it was asked for.
        mesh: sizes of the axes.
        rows, length: of the global micro-batch, and how many of them make a step.
        remat: policy of the backward pass.
        fits: whether the compiler found room; then the rest is known.
        weights, adapter, optimizer: bytes of the arrays that stay.
        peak: highest use of memory, bytes.
        flops: of the matrix products of a step, all chips.
        collectives: bytes by kind of collective, a step.
        compile_seconds: of the compilation.
        problem: what the compiler said, where it does not fit.
    """

    topology: str
    mesh: dict[str, int]
    rows: int
    length: int
    accumulation: int
    remat: Remat
    fits: bool
    weights: int
    adapter: int
    optimizer: int
    peak: int
    flops: int
    collectives: dict[str, int]
    compile_seconds: float
    problem: str = ""

    @property
    def chips(self) -> int:
        """Devices of the mesh."""
        return self.mesh["data"] * self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def activations(self) -> int:
        """What is neither weights, adapter nor optimizer at the peak."""
        return self.peak - self.weights - self.adapter - self.optimizer

    @property
    def chip(self) -> Chip | None:
        """None for a CPU."""
        return CHIPS.get(self.topology.partition(":")[0])

    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least: by arithmetic, by reading weights, by collectives.

        Weights are read in the forward pass, in the backward pass, and where a policy computes the
        forward pass again.
        """
        chip = self.chip
        if chip is None:
            return {}
        passes = (2 if self.remat == "none" else 3) * self.accumulation
        return {
            "arithmetic": self.flops / self.chips / chip.flops,
            "weights": passes * self.weights / chip.bandwidth,
            "collectives": sum(self.collectives.values()) / chip.interconnect,
        }


def make_cpu_devices(topology: str) -> None:
    """For `cpu:8`, eight devices of this CPU, if JAX has not been used yet."""
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        with contextlib.suppress(RuntimeError):  # it has; `devices_of` says how many there are
            jax.config.update("jax_num_cpu_devices", int(count))


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as `v5e:2x4`, or of `cpu:8`.

    Raises:
        UserError: no such topology, or the compiler for it is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape):
        if len(jax.devices("cpu")) < int(shape):
            raise UserError(f"{topology}: this process has {len(jax.devices('cpu'))} CPU devices")
        return jax.devices("cpu")[: int(shape)]
    if kind not in CHIPS or not shape:
        raise UserError(f"{topology!r} is no topology; such are {_KNOWN}")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    if shape in ("1x1", "1x1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # the plugin raises many kinds
        text = str(error).strip().splitlines()[0]
        if "libtpu" in text.lower() or "Unable to initialize" in text or "not found" in text:
            raise UserError(
                f"{topology}: the compiler for TPUs is not installed: pip install '.[tpu]' ({text})"
            ) from None
        raise UserError(f"{topology!r} is no topology ({text}); such are {_KNOWN}") from None
    return list(found.devices)


def plan(
    config: RunConfig,
    model_config: Phi3Config,
    topology: str,
    remat: Remat | None = None,
    rows: int | None = None,
    quick: bool = False,
) -> Plan:
    """Compile the training step of a config for a topology.

    Args:
        config: of a run; where it names no mesh, one is chosen as a run does.
        model_config: of the base model.
        topology: see `devices_of`.
        remat: instead of the config's policy.
        rows: of each device, instead of the config's batch size.
        quick: compile with little effort: several times faster, with a higher peak, much higher
            over a quantised base.

    Raises:
        UserError: a topology, a mesh or an attention that does not fit.
        lora_flax.LoraError: a target that does not fit.
    """
    devices = devices_of(topology)
    platform = "cpu" if topology.startswith("cpu:") else "tpu"
    remat = config.training.remat if remat is None else remat
    rows = config.training.per_device_train_batch_size if rows is None else rows
    base = nnx.eval_shape(functools.partial(_base, config, model_config, platform))
    sizes = config.mesh.sizes
    if sizes is None:
        chip = CHIPS.get(topology.partition(":")[0])
        memory = int(chip.memory * 2**30) if chip else None
        sizes = choose_axes(model_bytes(base), len(devices), memory)
    mesh = make_mesh(*sizes, devices=devices)
    model = functools.partial(_wrapped, config, model_config, platform)
    graphdef, trainable, frozen = partition(nnx.eval_shape(model))
    tx = make_optimizer(config.training, total_steps=1000)
    state = TrainState(trainable, jax.eval_shape(tx.init, trainable))
    shardings = TrainState(
        state_shardings(trainable, mesh), optimizer_shardings(tx, trainable, mesh)
    )
    state, frozen = _placed(state, shardings), _placed(frozen, state_shardings(frozen, mesh))
    batch = _batch(config, rows * row_devices(mesh), mesh)
    accumulation, count, length = batch["tokens"].shape
    whole = NamedSharding(mesh, PartitionSpec())
    scalars = [jax.ShapeDtypeStruct((), kind, sharding=whole) for kind in (jnp.int32, jnp.uint32)]
    loss = loss_settings(config.training, row_devices(mesh))
    arguments = (state, frozen, batch, *scalars)
    trips = -(-(length - 1) // chunk_width(count, length - 1, model_config.vocab_size, loss))
    with jax.set_mesh(mesh):
        step = functools.partial(train_step, graphdef, tx, remat, loss=loss)
        flops = matmul_flops(jax.make_jaxpr(step)(*arguments), trips)
        lowered = jit_train_step(graphdef, tx, remat, loss, shardings).lower(*arguments)
        started = time.monotonic()
        compiled, problem = _compile(lowered, quick and platform == "tpu")
        seconds = time.monotonic() - started
    analysis = compiled and compiled.memory_analysis()
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        rows=count,
        length=length,
        accumulation=accumulation,
        remat=remat,
        fits=compiled is not None,
        weights=_bytes_of(frozen),
        adapter=_bytes_of(state.trainable),
        optimizer=_bytes_of(state.opt_state),
        peak=_peak(analysis, platform) if analysis else 0,
        flops=flops,
        collectives=collective_bytes(compiled.as_text(), trips) if compiled else {},
        compile_seconds=seconds,
        problem=problem,
    )


def largest(
    config: RunConfig,
    model_config: Phi3Config,
    topology: str,
    say: Callable[[Plan], None] = lambda plan: None,
    quick: bool = False,
) -> Plan | None:
    """The cheapest policy that fits, with the largest batch that fits under it.

    Every answer was compiled. The batch is doubled until it does not fit, then the gap is halved.

    Args:
        config, model_config, topology: as in `plan`.
        say: is given each plan that was tried.
        quick: as in `plan`.

    Returns:
        None where not even one row fits a device.
    """

    def attempt(remat: Remat, rows: int) -> Plan | None:
        tried = plan(config, model_config, topology, remat, rows, quick)
        say(tried)
        return tried if tried.fits else None

    for remat in POLICIES:
        best = attempt(remat, 1)
        if best is None:
            continue
        low, high = 1, 2
        while (found := attempt(remat, high)) is not None:
            best, low, high = found, high, 2 * high
        while high - low > max(1, low // 8):
            middle = (low + high) // 2
            found = attempt(remat, middle)
            best, low, high = (found, middle, high) if found else (best, low, middle)
        return best
    return None


def _base(config: RunConfig, model_config: Phi3Config, platform: str) -> Phi3:
    named = config.model.dtype
    dtype = ("float32" if platform == "cpu" else "bfloat16") if named == "auto" else named
    model = Phi3(model_config, rngs=nnx.Rngs(0), dtype=dtype)
    model.set_attn_implementation(attn_implementation(config, platform))
    if (quantization := config.model.bitsandbytes) is not None:
        lora_flax.quantize(model, quantization)
    return model


def _wrapped(config: RunConfig, model_config: Phi3Config, platform: str) -> Phi3:
    """With its adapter; A and B start as always, for how they start changes no shape."""
    model = _base(config, model_config, platform)
    lora = dataclasses.replace(config.peft.to_lora(), init_lora_weights=True)
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(0))
    return model


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _batch(config: RunConfig, rows: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.training.gradient_accumulation_steps, rows, config.data.max_length)
    names = {"tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32}
    kinds: dict[str, Any] = names | {"targets": jnp.bool_}
    sharding = batch_sharding(mesh, leading=1)
    return {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()
    }


def _compile(lowered: Any, quick: bool) -> tuple[Any, str]:
    """The program, or None and why there is no room for it."""
    options = {"exec_time_optimization_effort": -1.0} if quick else {}
    try:
        return lowered.compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).strip().splitlines()[0]


def _peak(analysis: Any, platform: str) -> int:
    if platform == "tpu":
        return analysis.peak_memory_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes  # CPU tells no peak


def _bytes_of(tree: Any) -> int:
    """On one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
