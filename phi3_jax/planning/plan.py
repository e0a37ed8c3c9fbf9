"""Compile the training step for hardware you do not have, and report what it needs.

The step is the one that `phi3-jax train` runs, in a sweep for all members together, built from
shapes alone: nothing is loaded, nothing is allocated. The TPU compiler comes with
`pip install 'phi3-jax[tpu]'` and needs no TPU.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import lora_flax
from phi3_jax.checkpoint.abstract import abstract_model, abstract_quantized, model_bytes
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.evaluation.loss import LossSettings, chunk_count
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3
from phi3_jax.model.remat import Remat
from phi3_jax.planning.adapter import what_trains, with_adapter
from phi3_jax.planning.collectives import collective_bytes
from phi3_jax.planning.costs import Product, products, total_flops
from phi3_jax.planning.hlo import Program
from phi3_jax.planning.profile import Profile, model_flops, profile
from phi3_jax.planning.steps import RunStep, Step, SweepStep
from phi3_jax.planning.topology import CHIPS, Chip, devices_of, mean_hops
from phi3_jax.platform import attn_implementation, free_memory
from phi3_jax.sharding.mesh import (
    choose_axes,
    for_at_most,
    for_members,
    make_mesh,
    row_devices,
    token_devices,
)
from phi3_jax.training.lora_matmul import refuse_sweep, use_lora_matmul
from phi3_jax.training.remat import choose
from phi3_jax.training.setup import loss_settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled step; byte counts are per chip.

    Attributes:
        topology: the requested topology.
        mesh: sizes of the axes.
        rows, length: shape of the global micro-batch, and how many of them make a step.
        remat: rematerialization policy of the backward pass.
        fits: whether the compiler found enough memory; only then are the other fields known.
        weights, adapter, optimizer: bytes of the persistent arrays.
        peak: peak memory, bytes.
        host: host memory used by the `offload` policy, bytes.
        flops: FLOPs of the matrix products of a step, all chips.
        traffic: bytes of the operands and results of the matrix products of a step, on one chip;
            other reads and writes are fused with them or small.
        collectives: bytes per step, by kind of collective.
        compile_seconds: compilation time.
        problem: the compiler's message if it does not fit.
        profile: estimated cycles by part, if they were asked for and it fits.
        members: adapters of a sweep, each with these rows; 1 for a single run.
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
    profile: Profile | None = None
    members: int = 1

    @property
    def chips(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.mesh.values())

    @property
    def activations(self) -> int:
        """Peak memory minus weights, adapter and optimizer."""
        return self.peak - self.weights - self.adapter - self.optimizer

    @property
    def chip(self) -> Chip | None:
        """The chip's specifications; None for a CPU."""
        return CHIPS.get(self.topology.partition(":")[0])

    @property
    def weight_traffic(self) -> int:
        """The unavoidable part of `traffic`: the weights, once per pass.

        They are read in the forward pass, the backward pass, and again if the policy is `full`.
        They are read in full even when sharded over `fsdp` and `sequence`.
        """
        passes = (3 if self.remat == "full" else 2) * self.accumulation
        return passes * self.weights * self.mesh["fsdp"] * self.mesh["sequence"]

    def roofline(self) -> dict[str, float]:
        """Seconds per step for arithmetic, HBM and interconnect, each at peak rate."""
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
    profiled: bool = False,
) -> Plan:
    """Compile the training step of a config for a topology.

    Args:
        config: a run's config; if it sets no mesh, one is chosen the way a run does. For a
            checkpoint saved quantized, `model.quantization` names the settings, as in
            `phi3_jax.planning.report.read_base`.
        model_config: the base model's config.
        topology: see `devices_of`.
        remat: overrides the config's policy.
        rows: rows per device; overrides the config's batch size.
        quick: compile with low effort: several times faster, but with a higher peak, much higher
            for a quantized base.
        profiled: estimate the cycles of each part too.

    Raises:
        UserError: the topology, mesh or attention implementation is not possible.
        lora_flax.LoraError: a target matches no layer, or a damaged adapter.
    """
    devices = devices_of(topology)
    platform = "cpu" if topology.startswith("cpu:") else "tpu"
    chip = CHIPS.get(topology.partition(":")[0])
    if profiled and chip is None:
        raise UserError(f"{topology}: the compiler for CPUs gives no estimates to profile")
    rows = config.training.per_device_train_batch_size if rows is None else rows
    lora, model_config = what_trains(config, model_config)
    base = _base(config, model_config, platform)
    mesh = _mesh(config, base, chip, devices)
    sizes = dict(mesh.shape)
    if config.sweep.values:
        mesh = for_members(mesh, config.sweep.count)
    step = _step(config, base, lora, mesh, rows)
    accumulation, length = config.training.gradient_accumulation_steps, config.data.max_length
    count, sequence = rows * row_devices(mesh), mesh.shape["sequence"]
    state, rest = step.placed(mesh)
    policy = config.training.remat if remat is None else remat
    if policy == "auto":
        tokens = rows * length * step.together
        policy = _auto(config, model_config, chip, tokens, mesh, _bytes_of((state, rest)))
    loss, vocab = loss_settings(config.training), model_config.vocab_size
    work = _products(step, policy, (accumulation, rows, length), loss, vocab, devices[0])
    # One chip's rows, of which `tensor` and `sequence` chips each compute a part.
    sharing = mesh.shape["tensor"] * sequence * step.together
    work = [product.times(step.each).shared_by(sharing) for product in work]
    loss = loss_settings(config.training, token_devices(mesh))
    trips = chunk_count(count, length, vocab, loss, sequence)
    with jax.set_mesh(mesh):
        compiling = step.jit(policy, loss, step.shardings(mesh)[0])
        lowered = compiling.lower(state, *rest, *step.inputs(mesh, (accumulation, count, length)))
        started = time.monotonic()
        compiled, problem = _compile(lowered, quick and platform == "tpu")
        seconds = time.monotonic() - started
    analysis = compiled and compiled.memory_analysis()
    program = Program.parse(compiled.as_text() if compiled else "")
    costs = None
    if profiled and compiled and chip:
        needed = step.members * model_flops(model_config, accumulation * count, length) / mesh.size
        costs = profile(program, work, chip, needed, trips, mean_hops(mesh.devices.flat))
    return Plan(
        topology=topology,
        mesh=sizes,
        rows=count,
        length=length,
        accumulation=accumulation,
        remat=policy,
        fits=compiled is not None,
        weights=_bytes_of(rest),
        adapter=_bytes_of(state.trainable),
        optimizer=_bytes_of(state.opt_state),
        peak=_peak(analysis, platform) if analysis else 0,
        host=analysis.host_temp_size_in_bytes if analysis else 0,
        flops=total_flops(work) * mesh.size,
        traffic=sum(product.bytes for product in work),
        collectives={
            kind: step.times * size for kind, size in collective_bytes(program, trips).items()
        },
        compile_seconds=seconds,
        problem=problem,
        profile=costs,
        members=step.members,
    )


def _step(config: RunConfig, base: Phi3, lora: lora_flax.LoraConfig, mesh: Mesh, rows: int) -> Step:
    """The step of a run or sweep with that adapter and that many rows per device."""
    platform = mesh.devices.flat[0].platform
    base.set_attn_implementation(
        attn_implementation(
            config.model, config.data, rows, base.config, platform, mesh.shape["sequence"]
        )
    )
    if config.model.quantized_matmul == "pallas":
        if platform != "tpu" or mesh.size > 1:
            raise UserError("model.quantized_matmul: pallas needs a topology of a single TPU")
        lora_flax.use_fused_matmul(base, "tpu")
    if config.sweep.values:
        refuse_sweep(config)
        tokens = rows * row_devices(mesh) * config.data.max_length
        return SweepStep(config, base, lora, mesh, tokens)
    model = with_adapter(base, lora)
    if config.model.lora_matmul == "pallas":
        use_lora_matmul(model, config, mesh, platform)
    return RunStep(config, model)


def _auto(
    config: RunConfig,
    model_config: Phi3Config,
    chip: Chip | None,
    tokens: int,
    mesh: Mesh,
    stays: int,
) -> Remat:
    """What `gradient_checkpointing: auto` chooses for that many tokens on a device.

    Beside them are `stays` bytes of weights and state.
    """
    itemsize = jnp.dtype(_dtype(config, "cpu" if chip is None else "tpu")).itemsize
    free = free_memory() if chip is None else round(0.9 * (chip.memory * 2**30 - stays))
    cut = {"devices": mesh.shape["sequence"], "tensor": mesh.shape["tensor"]}
    return choose(model_config, tokens, itemsize, free, **cut)[0]


def _base(config: RunConfig, model_config: Phi3Config, platform: str) -> Phi3:
    """The base model as a run loads it, shapes and dtypes only."""
    model = abstract_model(model_config, _dtype(config, platform))
    quantization = config.model.bitsandbytes
    return model if quantization is None else abstract_quantized(model, quantization)


def _dtype(config: RunConfig, platform: str) -> str:
    """`model.dtype` on that platform."""
    named = config.model.dtype
    return ("float32" if platform == "cpu" else "bfloat16") if named == "auto" else named


def _mesh(config: RunConfig, base: Phi3, chip: Chip | None, devices: Sequence[Any]) -> Mesh:
    """The config's mesh, or the one that a run would choose."""
    if config.mesh.sizes is not None:
        return make_mesh(**config.mesh.sizes, devices=devices)
    memory = int(chip.memory * 2**30) if chip else None
    data, fsdp, tensor = choose_axes(model_bytes(base), len(devices), memory)
    if config.sweep.values:
        several = len({device.process_index for device in devices}) > 1
        data, fsdp = for_at_most(config.sweep.count, data, fsdp, all_devices=several)
    return make_mesh(data, fsdp, tensor, devices=devices)


def _products(
    step: Step,
    remat: Remat,
    shape: tuple[int, int, int],
    loss: LossSettings,
    vocab: int,
    device: Any,
) -> list[Product]:
    """The matrix products for one device's rows."""
    mesh, part = make_mesh(1, 1, devices=[device]), step.on_one_device()
    _, rows, length = shape
    trips = chunk_count(rows, length, vocab, loss)
    state, rest = part.arrays()
    with jax.set_mesh(mesh):
        jaxpr = part.jit(remat, loss).trace(state, *rest, *part.inputs(mesh, shape)).jaxpr
    return products(jaxpr, trips)


def _compile(lowered: Any, quick: bool) -> tuple[Any, str]:
    """The compiled program, or None and why it does not fit in memory."""
    options = {"exec_time_optimization_effort": -1.0} if quick else {}
    try:
        return lowered.compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).strip().splitlines()[0]


def _peak(analysis: Any, platform: str) -> int:
    """The compiler's peak if it reports the device's; else all it allocates, slightly more.

    A CPU reports no peak, and when `offload` keeps something, a TPU reports the host's.
    """
    if platform == "tpu" and not analysis.host_temp_size_in_bytes:
        return int(analysis.peak_memory_in_bytes)
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes)


def _bytes_of(tree: Any) -> int:
    """Bytes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
