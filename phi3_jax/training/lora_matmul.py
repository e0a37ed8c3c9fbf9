"""How a run multiplies in layers with LoRA: `model.lora_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh

import lora_flax
from phi3_jax.compiler import step_options
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.model.network import Phi3
from phi3_jax.platform import compute_dtype
from phi3_jax.sharding.processes import on_first
from phi3_jax.sharding.rules import lora_shards
from phi3_jax.training.setup import Setup


def choose_lora_matmul(setup: Setup, kept: str | None) -> None:
    """Set the form of layers with LoRA; call it once the adapter is there.

    What was chosen is added to the setup's choices and notes.

    Args:
        setup: a loaded run with its adapter.
        kept: the choice of the run that is resumed, taken again if it runs here.

    Raises:
        UserError: `pallas` was requested but cannot run here.
        lora_flax.LoraError: `pallas` was requested but suits none of the layers.
    """
    chosen, platform = setup.config.model.lora_matmul, jax.default_backend()
    if chosen == "auto":
        chosen = _auto(setup, kept) if platform == "tpu" else "xla"
    if chosen == "pallas":
        use_lora_matmul(setup.model, setup.config, setup.mesh, platform)
    setup.choices["lora_matmul"] = chosen


def use_lora_matmul(model: Phi3, config: RunConfig, mesh: Mesh, platform: str) -> None:
    """Make a model use the fused kernels.

    Args:
        model: with its adapter.
        config: the run's config.
        mesh: what the run is on.
        platform: its kind of devices.

    Raises:
        UserError: the kernels do not run there.
        lora_flax.LoraError: they suit none of the layers.
    """
    refuse_sweep(config)
    if platform != "tpu":
        raise UserError(
            f"model.lora_matmul: pallas needs a TPU, and this is a {platform.upper()}; use auto"
        )
    lora_flax.use_fused_lora(model, "tpu", *_cut(mesh))
    mlp: Any = model.model.layers.mlp
    # These kernels read the gradient of gate and up as one array.
    if getattr(mlp.gate_up_proj, "platform", None) is not None:
        mlp.kernel = "tpu"


def refuse_sweep(config: RunConfig) -> None:
    """Raise UserError if a sweep asks for the kernels, which take one adapter."""
    if config.model.lora_matmul == "pallas" and config.sweep.values:
        raise UserError(
            "model.lora_matmul: pallas adds one adapter's update, and a sweep trains several at "
            "once; use auto"
        )


def _auto(setup: Setup, kept: str | None) -> Literal["xla", "pallas"]:
    """What `auto` means on a TPU."""
    if kept == "xla":
        return "xla"
    config, mesh = setup.config, setup.mesh
    if kept == "pallas":
        try:
            use_lora_matmul(setup.model, config, mesh, "tpu")
        except lora_flax.LoraError:
            setup.notes.append("LoRA matmul: pallas, as before, does not run here")
        else:
            return "pallas"
    tokens = config.training.per_device_train_batch_size * config.data.max_length
    time = functools.partial(
        lora_flax.time_fused_lora,
        setup.model,
        "tpu",
        tokens // mesh.shape["sequence"],
        compute_dtype(config.model.dtype),
        *_cut(mesh),
        compiler_options=step_options("tpu", 1, jax.local_devices()[0].device_kind),
    )

    def timed() -> list[str]:
        choice = time()
        return ["xla", ""] if choice is None else [choice.kernel, str(choice)]

    # Every process must compile the same program.
    kernel, note = on_first(timed)
    if note:
        setup.notes.append(note)
    return "pallas" if kernel == "pallas" else "xla"


def _cut(mesh: Mesh) -> tuple[Any, Mapping[str, int]]:
    """How a mesh cuts layers, and the sizes of its axes, as `lora_flax.use_fused_lora` takes it."""
    if mesh.size == 1:
        return None, {}
    return functools.partial(lora_shards, mesh=mesh), dict(mesh.shape)
