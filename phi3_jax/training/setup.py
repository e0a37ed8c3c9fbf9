"""From a config to everything that a run needs, loaded and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax import quickstart
from phi3_jax.attention import SPLASH_MULTIPLE, Implementation
from phi3_jax.base import base_bytes, kernel_reader, load_base
from phi3_jax.config import Phi3Config
from phi3_jax.data.batches import Batch
from phi3_jax.data.chat import load_tokenizer
from phi3_jax.data.dataset import Split, load_examples
from phi3_jax.errors import UserError
from phi3_jax.folder import resolve
from phi3_jax.mesh import choose_axes, make_mesh
from phi3_jax.model import Phi3
from phi3_jax.training.config import RunConfig, TrainingConfig
from phi3_jax.training.loss import LossSettings
from phi3_jax.training.sections import MeshConfig


@dataclasses.dataclass
class Setup:
    """A loaded run.

    Attributes:
        config: with `quickstart://` names made local paths, and the sizes of the mesh.
        model_dir: local folder of the base model.
        model: the base model, plain until `attach`.
        mesh: that the model lies on.
        tokenizer: the base model's own.
        train: training examples.
        test: held-out examples, if any.
    """

    config: RunConfig
    model_dir: Path
    model: Phi3
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    train: Split
    test: Split | None

    def describe(self) -> str:
        """Lines on the base model and the data."""
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        lines = [f"base model: {self.model_dir}", f"training data: {self.train.report}"]
        if self.mesh.size > 1:
            lines.insert(1, f"{self.mesh.size} devices: {axes}")
        if self.test is not None:
            lines.append(f"held-out data: {self.test.report}")
        return "\n".join(lines)


def set_up(config: RunConfig) -> Setup:
    """Load data and model; what is quick to check is checked before the weights are read.

    Raises:
        UserError: a path, a row or a checkpoint that does not fit.
    """
    config = local_paths(config)
    model_dir = resolve(config.model.path, config.model.revision)
    dtype = compute_dtype(config.model.dtype)
    mesh = _mesh_of(config, model_dir, dtype)
    config = config.model_copy(update={"mesh": MeshConfig(**mesh.shape)})
    model_config = Phi3Config.from_file(model_dir / "config.json")
    tokenizer = load_tokenizer(model_dir)
    train, test = load_examples(config.data, tokenizer)
    largest = max(int(e.tokens.max()) for split in (train, test) if split for e in split.examples)
    if largest >= model_config.vocab_size:
        raise UserError(
            f"{model_dir}: the tokenizer gives token id {largest}, the model knows "
            f"{model_config.vocab_size}; is the tokenizer another model's?"
        )
    if config.data.max_length > model_config.max_position_embeddings:
        raise UserError(
            f"data.max_length {config.data.max_length} exceeds the model's "
            f"{model_config.max_position_embeddings} positions"
        )
    implementation = attn_implementation(config, jax.default_backend())
    model = load_base(model_dir, dtype, config.model.bitsandbytes, mesh)
    model.set_attn_implementation(implementation)
    return Setup(config, model_dir, model, mesh, tokenizer, train, test)


def _mesh_of(config: RunConfig, model_dir: Path, dtype: jnp.dtype) -> Mesh:
    """The mesh that the config names, or one for all devices; a sweep has one device."""
    sizes = (1, 1, 1) if config.sweep.values else config.mesh.sizes
    if sizes is None:
        stats = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        weights = base_bytes(model_dir, dtype, config.model.bitsandbytes)
        sizes = choose_axes(weights, jax.device_count(), stats.get("bytes_limit"))
    return make_mesh(*sizes)


def attach(setup: Setup, batches: Sequence[Batch]) -> lora_flax.Report:
    """Give the model its adapter: a new one, or the one that the config goes on from.

    Args:
        setup: its model is plain.
        batches: `[A, B, S]`, of the first steps; EVA starts from them.

    Raises:
        UserError: no such adapter.
        lora_flax.LoraError: a target or an adapter that does not fit.
    """
    config = setup.config
    if config.peft.adapter_name_or_path is not None:
        adapter = resolve(config.peft.adapter_name_or_path)
        return lora_flax.load_peft(setup.model, adapter)
    rngs = nnx.Rngs(config.training.seed)
    report = lora_flax.wrap(setup.model, config.peft.to_lora(), rngs=rngs)
    if config.peft.init_lora_weights == "loftq":
        lora_flax.replace_lora_weights_loftq(setup.model, kernel_reader(setup.model_dir))
    if config.peft.init_lora_weights == "eva":
        micro = [
            {name: array[i] for name, array in batch.items()}
            for batch in batches
            for i in range(len(batch["tokens"]))
        ]
        report = lora_flax.initialize_lora_eva_weights(
            setup.model,
            micro,
            _run,
            mask=lambda b: b["targets"],
        )
    return report


def _run(model: nnx.Module, batch: Batch) -> jax.Array:
    assert isinstance(model, Phi3)
    arrays = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    return model.hidden_states(*arrays)


def loss_settings(config: TrainingConfig, devices: int = 1) -> LossSettings:
    """What the config minimises, with rows spread over so many devices."""
    return LossSettings(config.label_smoothing_factor, config.z_loss, devices=devices)


def attn_implementation(config: RunConfig, platform: str) -> Implementation:
    """The attention of a run on `cpu`, `gpu` or `tpu`.

    Raises:
        UserError: the one that the config names does not run there.
    """
    wanted, data = config.model.attn_implementation, config.data
    problems = []
    if platform != "tpu":
        problems.append(f"it is a kernel for TPUs, and this is a {platform}")
    for key in ("max_length", "pad_to_multiple_of"):
        if getattr(data, key) % SPLASH_MULTIPLE:
            problems.append(
                f"data.{key} {getattr(data, key)} is not a multiple of {SPLASH_MULTIPLE}"
            )
    if wanted == "splash" and problems:
        raise UserError(f"model.attn_implementation: splash cannot run: {'; '.join(problems)}")
    return "xla" if wanted == "xla" or problems else "splash"


def compute_dtype(name: str) -> jnp.dtype:
    """`auto`: XLA's CPU backend is no faster in bfloat16, so there it is float32."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def local_paths(config: RunConfig) -> RunConfig:
    """The config with `quickstart://` names made local paths; made on first use."""

    def local(path: str | None) -> str | None:
        if path is None or not quickstart.is_quickstart(path):
            return path
        return str(quickstart.resolve(path))

    data = config.data
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": local(config.model.path)}),
            "data": data.model_copy(
                update={"path": local(data.path), "test_path": local(data.test_path)}
            ),
        }
    )
