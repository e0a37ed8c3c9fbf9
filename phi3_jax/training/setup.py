"""Turn a config into everything a run needs, loaded and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.checkpoint.adapters import require_adapter
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.checkpoint.vocabulary import add_token_rows, load_adapter, rows_with, with_tokens
from phi3_jax.config.loader import RunConfig, TrainingConfig
from phi3_jax.config.optimizers import optimizer_note
from phi3_jax.config.sections import MeshConfig, ModelConfig
from phi3_jax.data.batches import Batch
from phi3_jax.data.dataset import Split
from phi3_jax.data.examples import lengths_of
from phi3_jax.data.loading import load_data
from phi3_jax.data.preview_text import first_row
from phi3_jax.data.tokenizer import new_token_ids, tokenizer_of
from phi3_jax.errors import UserError
from phi3_jax.evaluation.loss import LossSettings
from phi3_jax.model.attention import Implementation
from phi3_jax.model.network import Phi3
from phi3_jax.model.remat import Remat
from phi3_jax.platform import (
    attn_implementation,
    check_types,
    compute_dtype,
    set_quantized_matmul,
)
from phi3_jax.quickstart import local_paths
from phi3_jax.sharding.mesh import choose_axes, describe, for_at_most, for_members, make_mesh
from phi3_jax.sharding.processes import on_all, require_same
from phi3_jax.training.identity import run_identity


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
        adapter: folder of the adapter that the run continues from, if any.
        new_ids: token ids of `data.add_tokens`, whose rows a new adapter trains.
    """

    config: RunConfig
    checkpoint: Checkpoint
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    train: Split
    test: Split | None
    data: str
    adapter: Path | None
    new_ids: list[int]

    def describe(self) -> str:
        """Lines that describe the base model, the devices, the data and the optimizer."""
        lines = [f"base model: {self.checkpoint.directory}"]
        if self.mesh.size > 1:
            lines.append(f"{self.mesh.size} devices: {describe(self.config.mesh.sizes or {})}")
        lines.append(f"training data: {self.train.report}")
        if self.config.training.log_first_row:
            lines.append(first_row(self.train, self.tokenizer))
        if self.test is not None:
            lines.append(f"held-out data: {self.test.report}")
        notes = (self._rope_warning(), optimizer_note(self.config.training.optim))
        lines += [note for note in notes if note is not None]
        return "\n".join(lines)

    def lora_of(self, config: RunConfig) -> lora_flax.LoraConfig:
        """What a new adapter trains: the section `peft`, and the rows of new tokens."""
        lora = config.peft.to_lora()
        return with_tokens(lora, self.new_ids, self.checkpoint.config) if self.new_ids else lora

    def _rope_warning(self) -> str | None:
        """Where servers with a long context would use other LongRoPE factors than training."""
        network = self.checkpoint.config
        original, most = network.original_max_position_embeddings, network.max_position_embeddings
        if network.longrope is None or self.config.model.rope_factors in ("short", "long"):
            return None
        longest = self.config.data.max_length
        if self.train.stream is None:  # else only its first rows are here
            longest = int(lengths_of(self.train.examples).max())
        if longest > original or most <= original:
            return None
        return (
            f"warning: no row is longer than {original} tokens, so that only LongRoPE's short "
            f"factors are trained; vLLM and llama.cpp use the long ones for every text if their "
            f"context is above {original}. Serve with at most that, or set "
            "model.rope_factors: long"
        )


@dataclasses.dataclass
class Setup(Prepared):
    """A loaded run.

    Attributes:
        model: the base model, without an adapter until `attach`.
        choices: what `auto` means on this device, by key of the section `model`; what the config
            names itself is here as well.
        notes: lines about these choices.
    """

    model: Phi3
    choices: dict[str, str]
    notes: list[str]

    def describe(self) -> str:
        """Lines that describe the base model, the devices, the data and the optimizer."""
        return "\n".join([super().describe(), *self.notes])


def set_up(config: RunConfig, chosen: Mapping[str, str] | None = None) -> Setup:
    """Load data and model, running the quick checks before reading the weights.

    Args:
        config: the run's config.
        chosen: the `choices` of the run that is resumed. Rounding differs between kernels, so
            `auto` means the same again where that runs here.

    Raises:
        UserError: a bad path, row or checkpoint on any process, or one that differs between
            processes.
    """
    prepared = on_all(lambda: _prepare(config))
    checkpoint = prepared.checkpoint
    require_same(f"base model ({checkpoint.fingerprint[:12]})")
    require_same(f"training data ({prepared.data[:12]})")
    config = prepared.config
    chosen, notes = chosen or {}, []
    check_types(config.model, jax.default_backend())
    sequence = prepared.mesh.shape["sequence"]
    attention, note = _attention(config, checkpoint, sequence, chosen.get("attn_implementation"))
    notes += note
    dtype = compute_dtype(config.model.dtype)
    model = checkpoint.load(
        dtype, prepared.mesh, config.model.bitsandbytes, config.model.rope_factors
    )
    if prepared.new_ids:
        add_token_rows(model, prepared.new_ids)
    model.set_attn_implementation(attention)
    rows = config.training.per_device_train_batch_size * config.data.max_length
    choose = functools.partial(
        set_quantized_matmul,
        model,
        devices=prepared.mesh.size,
        rows=rows,
        dtype=dtype,
        backward=True,
    )
    kernel, note = _matmul(choose, config.model.quantized_matmul, chosen.get("quantized_matmul"))
    notes += note
    choices = {"attn_implementation": attention, "quantized_matmul": kernel}
    return Setup(**vars(prepared), model=model, choices=choices, notes=notes)


def _attention(
    config: RunConfig, checkpoint: Checkpoint, sequence: int, kept: str | None
) -> tuple[Implementation, list[str]]:
    """The attention implementation, and what to say about it."""

    def implementation(section: ModelConfig) -> Implementation:
        rows = config.training.per_device_train_batch_size
        platform = jax.default_backend()
        return attn_implementation(
            section, config.data, rows, checkpoint.config, platform, sequence
        )

    if config.model.attn_implementation != "auto" or kept is None:
        return implementation(config.model), []
    update = {"attn_implementation": kept.removesuffix("_packed")}
    try:
        return implementation(config.model.model_copy(update=update)), []
    except UserError:
        anew = implementation(config.model)
        return anew, [f"attention: {kept}, as before, does not run here; now {anew}"]


def _matmul(
    choose: Callable[..., lora_flax.MatmulChoice | None], wanted: str, kept: str | None
) -> tuple[str, list[str]]:
    """The matmul of quantized layers, and what to say about it."""
    if wanted != "auto":
        choose(wanted=wanted)
        return wanted, []
    notes = []
    if kept is not None:
        try:
            choose(wanted=kept)
        except (UserError, lora_flax.LoraError):
            notes.append(f"4-bit matmul: {kept}, as before, does not run here")
        else:
            return kept, []
    choice = choose(wanted="auto")
    if choice is not None:
        notes.append(str(choice))
    return ("xla" if choice is None else choice.kernel), notes


def _prepare(config: RunConfig) -> Prepared:
    config = local_paths(config)
    checkpoint = Checkpoint.open(config.model.path, config.model.revision)
    mesh = mesh_of(config, checkpoint)
    config = config.model_copy(update={"mesh": MeshConfig(**mesh.shape)})
    if config.sweep.values:
        mesh = for_members(mesh, config.sweep.count)
    adapter = continued_adapter(config)
    tokenizer = tokenizer_of(checkpoint.directory, adapter, config.data)
    new_ids = [] if adapter else new_token_ids(tokenizer, config.data.new_tokens)
    train, test = load_data(config.data, tokenizer)
    largest = max(split.examples.largest for split in (train, test) if split)
    rows = max(checkpoint.config.vocab_size, *(id + 1 for id in new_ids), 0)
    if adapter is not None:
        rows = rows_with(checkpoint.config, adapter)
    if largest >= rows:
        raise UserError(
            f"{checkpoint.directory}: the tokenizer produces token id {largest}, but the model's "
            f"vocabulary size is {rows}; is this another model's tokenizer?"
        )
    if train.stream is not None:
        stream = dataclasses.replace(train.stream, vocab_size=rows)
        train = dataclasses.replace(train, stream=stream)
    if config.data.max_length > checkpoint.config.max_position_embeddings:
        raise UserError(
            f"data.max_length {config.data.max_length} exceeds the model's "
            f"{checkpoint.config.max_position_embeddings} positions"
        )
    # Reads every file's header, so that a damaged file fails here, on all processes.
    _ = checkpoint.fingerprint
    data = train.fingerprint()
    return Prepared(config, checkpoint, mesh, tokenizer, train, test, data, adapter, new_ids)


def continued_adapter(config: RunConfig) -> Path | None:
    """The folder of the adapter that a run continues from.

    Raises:
        UserError: it does not exist or is not an adapter.
    """
    if config.peft.adapter_name_or_path is None:
        return None
    folder = resolve(config.peft.adapter_name_or_path, config.peft.adapter_revision)
    require_adapter(folder)
    return folder


def mesh_of(config: RunConfig, checkpoint: Checkpoint) -> Mesh:
    """A mesh with the configured sizes, or one over all devices."""
    if (sizes := config.mesh.sizes) is not None:
        return make_mesh(**sizes, devices=None)
    members = config.sweep.count if config.sweep.values else jax.device_count()
    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    weights = checkpoint.bytes(compute_dtype(config.model.dtype), config.model.bitsandbytes)
    data, fsdp, tensor = choose_axes(weights, jax.device_count(), stats.get("bytes_limit"))
    data, fsdp = for_at_most(members, data, fsdp, all_devices=jax.process_count() > 1)
    return make_mesh(data, fsdp, tensor)


def attach(setup: Setup, batches: Iterable[Batch]) -> lora_flax.Report:
    """Attach an adapter to the model: a new one, or the one the config continues from.

    Args:
        setup: the loaded run; its model has no adapter yet.
        batches: `[A, B, S]` batches of the first steps, used to initialize EVA and QERA.

    Raises:
        UserError: the adapter does not exist.
        lora_flax.LoraError: a target or adapter does not match the model.
    """
    config = setup.config
    if setup.adapter is not None:
        return load_adapter(setup.model, setup.adapter)
    rngs = nnx.Rngs(config.training.seed)
    lora = setup.lora_of(config)
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
    remat = config.training.remat
    run = functools.partial(_run, remat="full" if remat == "auto" else remat)
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


def identity_of(setup: Setup, devices: int, planned: int) -> dict[str, Any]:
    """The identity of the run, with the rows of a batch spread over `devices`.

    `planned` is the number of steps before `training.extend`.
    """
    held_out = None if setup.test is None else setup.test.fingerprint()
    base = setup.checkpoint.fingerprint
    return run_identity(setup.config, base, setup.data, held_out, devices, setup.choices, planned)


def loss_settings(config: TrainingConfig, devices: int = 1) -> LossSettings:
    """The loss settings of the config, with tokens spread over `devices`."""
    return LossSettings(
        config.label_smoothing_factor,
        config.z_loss,
        devices=devices,
        loss_type=config.loss_type,
        neftune_noise_alpha=config.neftune_noise_alpha or 0.0,
    )
