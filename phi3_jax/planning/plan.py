"""Compile the training step for a machine that is not there, and say what it takes.

The step is the one that `train.py` runs, built from shapes alone: nothing is loaded, nothing is
allocated. The compiler for TPUs comes with `pip install 'phi3-jax[tpu]'` and needs no TPU.
"""

from __future__ import annotations

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
from phi3_jax.checkpoint.base import model_bytes
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.evaluation.loss import chunk_count
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3, Remat
from phi3_jax.planning.costs import collective_bytes, matmul_bytes, matmul_flops
from phi3_jax.planning.topology import CHIPS, Chip, devices_of
from phi3_jax.platform import attn_implementation
from phi3_jax.sharding.mesh import (
    batch_sharding,
    choose_axes,
    make_mesh,
    optimizer_shardings,
    row_devices,
    state_shardings,
)
from phi3_jax.training.optimizer import make_optimizer
from phi3_jax.training.setup import loss_settings
from phi3_jax.training.step import TrainState, jit_train_step, partition, train_step

POLICIES: tuple[Remat, ...] = ("none", "dots", "full")  # the cheapest to compute first


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
        host: what the policy `offload` keeps in the host's memory, bytes.
        flops: of the matrix products of a step, all chips.
        traffic: bytes of the operands and results of the matrix products of a step, one chip; what
            else a step reads and writes is fused with them or small.
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
    host: int
    flops: int
    traffic: int
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

    @property
    def weight_traffic(self) -> int:
        """The part of `traffic` that nothing can avoid: the weights, once for each pass.

        They are read in the forward pass, in the backward pass, and where a policy computes the
        forward pass again; whole, where they are cut up over `fsdp` too.
        """
        passes = (2 if self.remat == "none" else 3) * self.accumulation
        return passes * self.weights * self.mesh["fsdp"]

    def roofline(self) -> dict[str, float]:
        """Seconds that arithmetic, HBM and interconnect take for a step at their full rates."""
        chip = self.chip
        if chip is None:
            return {}
        return {
            "arithmetic": self.flops / self.chips / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "collectives": sum(self.collectives.values()) / chip.interconnect,
        }


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
            over a quantized base.

    Raises:
        UserError: a topology, a mesh or an attention that does not fit.
        lora_flax.LoraError: a target that does not fit.
    """
    devices = devices_of(topology)
    platform = "cpu" if topology.startswith("cpu:") else "tpu"
    remat = config.training.remat if remat is None else remat
    rows = config.training.per_device_train_batch_size if rows is None else rows
    sizes = config.mesh.sizes
    if sizes is None:
        base = nnx.eval_shape(functools.partial(_base, config, model_config, platform))
        chip = CHIPS.get(topology.partition(":")[0])
        memory = int(chip.memory * 2**30) if chip else None
        sizes = choose_axes(model_bytes(base), len(devices), memory)
    mesh = make_mesh(*sizes, devices=devices)
    model = nnx.eval_shape(functools.partial(_wrapped, config, model_config, platform))
    if config.model.quantized_matmul == "pallas":
        if platform != "tpu" or mesh.size > 1:
            raise UserError(f"model.quantized_matmul: pallas runs on one TPU, not on {topology}")
        lora_flax.use_fused_matmul(model, "tpu")
    graphdef, trainable, frozen = partition(model)
    tx = make_optimizer(config.training, total_steps=1000)
    state = TrainState(trainable, jax.eval_shape(tx.init, trainable))
    shardings = TrainState(
        state_shardings(trainable, mesh), optimizer_shardings(tx, trainable, mesh)
    )
    step = functools.partial(train_step, graphdef, tx, remat)
    flops, traffic = _counts(config, step, (state, frozen), rows, devices[0], model_config)
    state, frozen = _placed(state, shardings), _placed(frozen, state_shardings(frozen, mesh))
    batch = _batch(config, rows * row_devices(mesh), mesh)
    accumulation, count, length = batch["tokens"].shape
    loss = loss_settings(config.training, row_devices(mesh))
    arguments = (state, frozen, batch, *_scalars(mesh))
    trips = chunk_count(count, length, model_config.vocab_size, loss)
    with jax.set_mesh(mesh):
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
        host=analysis.host_temp_size_in_bytes if analysis else 0,
        flops=flops * row_devices(mesh),
        traffic=traffic // mesh.shape["tensor"],
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
    model.set_attn_implementation(attn_implementation(config, model_config, platform))
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


def _scalars(mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Step and seed."""
    whole = NamedSharding(mesh, PartitionSpec())
    return [jax.ShapeDtypeStruct((), kind, sharding=whole) for kind in (jnp.int32, jnp.uint32)]


def _counts(
    config: RunConfig,
    step: Callable[..., Any],
    arrays: tuple[Any, Any],
    rows: int,
    device: Any,
    model_config: Phi3Config,
) -> tuple[int, int]:
    """FLOPs, and bytes of operands and results, of the matrix products over one device's rows."""
    mesh = make_mesh(1, 1, 1, devices=[device])
    batch, loss = _batch(config, rows, mesh), loss_settings(config.training)
    trips = chunk_count(rows, config.data.max_length, model_config.vocab_size, loss)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(functools.partial(step, loss=loss))(*arrays, batch, *_scalars(mesh))
    return matmul_flops(jaxpr, trips), matmul_bytes(jaxpr, trips)


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
    """The compiler's, where it tells that of the device; else all that it lays out, a little more.

    A CPU tells no peak, and where `offload` keeps something a TPU tells the host's.
    """
    if platform == "tpu" and not analysis.host_temp_size_in_bytes:
        return analysis.peak_memory_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def _bytes_of(tree: Any) -> int:
    """On one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
