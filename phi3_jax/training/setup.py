"""Turn a config into everything a run needs, loaded and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.config.loader import RunConfig, TrainingConfig
from phi3_jax.config.sections import MeshConfig, ModelConfig
from phi3_jax.data.batches import Batch
from phi3_jax.data.dataset import Split, load_examples
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.errors import UserError
from phi3_jax.evaluation.loss import LossSettings
from phi3_jax.model.network import Phi3, Remat
from phi3_jax.platform import (
    attn_implementation,
    check_types,
    compute_dtype,
    set_quantized_matmul,
)
from phi3_jax.quickstart import local_paths
from phi3_jax.sharding.mesh import choose_axes, make_mesh
from phi3_jax.sharding.processes import on_all, require_same


@dataclasses.dataclass
class Prepared:
    """A run with everything loaded except the weights.

    Attributes:
        config: the config, with `quickstart://` names resolved and mesh sizes filled in.
        checkpoint: the base model's folder.
        mesh: the device mesh for the model.
        tokenizer: the base model's tokenizer.
        train: training examples.
        test: held-out examples, if any.
        data: fingerprint of the training examples.
    """

    config: RunConfig
    checkpoint: Checkpoint
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    train: Split
    test: Split | None
    data: str

    def describe(self) -> str:
        """Lines that describe the base model, the devices and the data."""
        lines = [f"base model: {self.checkpoint.directory}"]
        if self.mesh.size > 1:
            axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
            lines.append(f"{self.mesh.size} devices: {axes}")
        lines.append(f"training data: {self.train.report}")
        if self.test is not None:
            lines.append(f"held-out data: {self.test.report}")
        return "\n".join(lines)


@dataclasses.dataclass
class Setup(Prepared):
    """A loaded run.

    Attributes:
        model: the base model, without an adapter until `attach`.
        choice: the matmul chosen for its quantized layers, if it was measured.
    """

    model: Phi3
    choice: lora_flax.MatmulChoice | None

    def describe(self) -> str:
        """Lines that describe the base model, the devices and the data."""
        lines = [super().describe()]
        return "\n".join(lines if self.choice is None else [*lines, str(self.choice)])


def set_up(config: RunConfig) -> Setup:
    """Load data and model, running the quick checks before reading the weights.

    Raises:
        UserError: a bad path, row or checkpoint on any process, or one that differs between
            processes.
    """
    prepared = on_all(lambda: _prepare(config))
    checkpoint = prepared.checkpoint
    require_same(f"base model ({checkpoint.fingerprint[:12]})")
    require_same(f"training data ({prepared.data[:12]})")
    config = prepared.config
    training, platform = config.training, jax.default_backend()
    implementation = attn_implementation(
        config.model,
        config.data,
        training.per_device_train_batch_size,
        checkpoint.config,
        platform,
    )
    check_types(config.model, platform)
    dtype = compute_dtype(config.model.dtype)
    model = checkpoint.load(dtype, prepared.mesh, config.model.bitsandbytes)
    model.set_attn_implementation(implementation)
    rows = training.per_device_train_batch_size * config.data.max_length
    choice = set_quantized_matmul(
        model, config.model.quantized_matmul, prepared.mesh.size, rows, dtype, backward=True
    )
    if choice is not None:
        # Rounding differs between kernels, so a resumed run must use the same one.
        section = config.model.model_copy(update={"quantized_matmul": choice.kernel})
        prepared.config = config.model_copy(update={"model": section})
    return Setup(**vars(prepared), model=model, choice=choice)


def _prepare(config: RunConfig) -> Prepared:
    config = local_paths(config)
    checkpoint = Checkpoint.open(config.model.path, config.model.revision)
    # A sweep uses one device.
    sizes = (1, 1, 1) if config.sweep.values else config.mesh.sizes
    mesh = _mesh_of(sizes, config.model, checkpoint)
    config = config.model_copy(update={"mesh": MeshConfig(**mesh.shape)})
    tokenizer = load_tokenizer(checkpoint.directory)
    train, test = load_examples(config.data, tokenizer)
    largest = max(int(e.tokens.max()) for split in (train, test) if split for e in split.examples)
    if largest >= checkpoint.config.vocab_size:
        raise UserError(
            f"{checkpoint.directory}: the tokenizer produces token id {largest}, but the model's "
            f"vocabulary size is {checkpoint.config.vocab_size}; is this another model's tokenizer?"
        )
    if config.data.max_length > checkpoint.config.max_position_embeddings:
        raise UserError(
            f"data.max_length {config.data.max_length} exceeds the model's "
            f"{checkpoint.config.max_position_embeddings} positions"
        )
    _ = (
        checkpoint.fingerprint
    )  # reads every file's header, so a bad file fails here, on all processes
    return Prepared(config, checkpoint, mesh, tokenizer, train, test, train.fingerprint())


def _mesh_of(
    sizes: tuple[int, int, int] | None, model: ModelConfig, checkpoint: Checkpoint
) -> Mesh:
    """A mesh with the configured sizes, or one over all devices."""
    if sizes is None:
        stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
        weights = checkpoint.bytes(compute_dtype(model.dtype), model.bitsandbytes)
        sizes = choose_axes(weights, jax.device_count(), stats.get("bytes_limit"))
    return make_mesh(*sizes)


def attach(setup: Setup, batches: Sequence[Batch]) -> lora_flax.Report:
    """Attach an adapter to the model: a new one, or the one the config continues from.

    Args:
        setup: the loaded run; its model has no adapter yet.
        batches: `[A, B, S]` batches of the first steps, used to initialize EVA and QERA.

    Raises:
        UserError: the adapter does not exist.
        lora_flax.LoraError: a target or adapter does not match the model.
    """
    config = setup.config
    if config.peft.adapter_name_or_path is not None:
        adapter = resolve(config.peft.adapter_name_or_path)
        return lora_flax.load_peft(setup.model, adapter)
    rngs = nnx.Rngs(config.training.seed)
    lora = config.peft.to_lora()
    report = lora_flax.wrap(setup.model, lora, rngs=rngs)
    if not lora.init_is_deferred:
        return report
    start = lora.init_lora_weights
    read = setup.checkpoint.kernel
    micro = [
        {name: array[i] for name, array in batch.items()}
        for batch in batches
        for i in range(len(batch["tokens"]))
    ]
    run = functools.partial(_run, remat=config.training.remat)
    if start == "loftq":
        lora_flax.replace_lora_weights_loftq(setup.model, read)
    if start == "qera":
        lora_flax.initialize_lora_qera_weights(
            setup.model, read, micro, run, mask=lambda b: b["segment_ids"] != 0
        )
    if start == "eva":
        report = lora_flax.initialize_lora_eva_weights(
            setup.model, micro, run, mask=lambda b: b["targets"]
        )
    return report


def _run(model: nnx.Module, batch: Batch, remat: Remat) -> jax.Array:
    assert isinstance(model, Phi3)
    arrays = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    return model.hidden_states(*arrays, remat=remat)


def loss_settings(config: TrainingConfig, devices: int = 1) -> LossSettings:
    """The loss settings of the config, with rows spread over `devices`."""
    return LossSettings(config.label_smoothing_factor, config.z_loss, devices=devices)
