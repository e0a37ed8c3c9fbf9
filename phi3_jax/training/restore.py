"""The adapter of any checkpoint that a run still has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.layerwise import hollow_model
from phi3_jax.checkpoint.mistaken import hint
from phi3_jax.checkpoint.vocabulary import add_token_rows, load_adapter, with_tokens
from phi3_jax.config.loader import RunConfig, load_config
from phi3_jax.config.run import MAX_STEPS
from phi3_jax.config.sections import MeshConfig
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.tokenizer import new_token_ids, tokenizer_of
from phi3_jax.errors import UserError
from phi3_jax.model.network import Phi3
from phi3_jax.platform import compute_dtype
from phi3_jax.quickstart import local_paths
from phi3_jax.training.interrupt import report
from phi3_jax.training.loop import INIT_STEPS
from phi3_jax.training.metrics import read_evaluations
from phi3_jax.training.optimizer import make_optimizer, planned_steps
from phi3_jax.training.output import base_name, export_adapter
from phi3_jax.training.reading import check_arrays
from phi3_jax.training.schedule_free import averaged
from phi3_jax.training.setup import attach, continued_adapter, set_up
from phi3_jax.training.shards import flat_arrays, index_of
from phi3_jax.training.state_files import read_blocks, read_record, saved_records, saved_steps
from phi3_jax.training.step import TrainState, partition
from phi3_jax.training.strategies import Best
from phi3_jax.training.stream import batches_of


@dataclasses.dataclass(frozen=True)
class Restored:
    """An adapter that was made of a run's checkpoint.

    Attributes:
        step: the checkpoint's step.
        base: the run's base model.
        base_name: what adapter_config.json calls it.
        keep_rslora: the run's `peft.keep_rslora`.
    """

    step: int
    base: Checkpoint
    base_name: str
    keep_rslora: bool


@dataclasses.dataclass
class _Trained:
    """What `export_adapter` writes."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    model: Phi3


def write_checkpoint_adapter(run: Path, step: str, adapter: Path) -> Restored:
    """Write the PEFT adapter of a checkpoint, as the run itself writes the last one.

    Only the adapter's arrays and the base's embedding and head are loaded, except where the start
    of A and B was computed from the base or the data.

    Args:
        run: the run's output folder.
        step: a number of steps, `best` or `last`.
        adapter: folder to write.

    Raises:
        UserError, lora_flax.LoraError: not a run's folder, a sweep's, no such checkpoint, a damaged
            one, or another base model.
    """
    if not (run / "config.yaml").is_file():
        found = hint(run) if run.exists() else "there is no such folder"
        said = f"{run} is not a run's folder: it has no config.yaml"
        raise UserError(f"{said}; {found}" if found else said)
    config = local_paths(load_config(run / "config.yaml"))
    if config.sweep.values:
        raise UserError(
            f"{run} is a sweep, whose checkpoints hold all its adapters; give one of the adapters "
            "that it wrote with --adapter"
        )
    config = config.model_copy(update={"mesh": MeshConfig(data=1, fsdp=1, tensor=1)})
    folder = run.absolute() / "checkpoints"
    chosen = _choose(folder, step, Best.of(config.training))
    record = read_record(folder, chosen)
    checkpoint = Checkpoint.open(config.model.path, config.model.revision)
    if record["base"] != checkpoint.fingerprint:
        raise UserError(f"{folder / str(chosen)}: it was trained on a different base model")
    continued = continued_adapter(config)
    tokenizer = tokenizer_of(checkpoint.directory, continued, config.data)
    new_ids = [] if continued else new_token_ids(tokenizer, config.data.new_tokens)
    model = _untrained(config, checkpoint, continued, new_ids)
    _, trainable, _ = partition(model)
    # Only the shapes of its state matter; any schedule fits a run that long.
    tx = make_optimizer(config.training, MAX_STEPS, model)
    state = TrainState(trainable, jax.eval_shape(tx.init, trainable))
    wanted = {name: [index_of((), leaf.shape)] for name, leaf in flat_arrays(state).items()}
    blocks = read_blocks(folder, record, wanted)
    arrays = {name: jnp.asarray(blocks[name][index]) for name, (index,) in wanted.items()}
    check_arrays(folder / str(chosen), record, arrays)
    restored: TrainState = jax.tree.unflatten(jax.tree.structure(state), arrays.values())
    nnx.update(model, averaged(config.training, restored.opt_state, restored.trainable))
    trained = _Trained(config, tokenizer, model)
    export_adapter(trained, config, adapter, chosen, read_evaluations(run), run)
    return Restored(chosen, checkpoint, base_name(config.model.path), config.peft.keep_rslora)


def _choose(folder: Path, step: str, best: Best) -> int:
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder} has no checkpoint; the run's adapter can be given as --adapter")
    if step == "last":
        return steps[-1]
    if step == "best":
        records, damages = saved_records(folder)
        for damage in damages.values():
            report(f"warning: {damage}; not compared with the others")
        chosen = best.choose_saved(records)
        if chosen is None:
            raise UserError(f"{folder}: no checkpoint has {best.metric}, so that none is best")
        return chosen
    if int(step) not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}, only of {steps}")
    return int(step)


def _untrained(
    config: RunConfig, checkpoint: Checkpoint, continued: Path | None, new_ids: list[int]
) -> Phi3:
    """A model with the run's adapter before its first step; the base may have no values.

    Args:
        config: the run's config.
        checkpoint: its base model.
        continued: the adapter that it continued from, if any.
        new_ids: token ids of `data.add_tokens`.
    """
    dtype, quantization = compute_dtype(config.model.dtype), config.model.bitsandbytes
    lora = config.peft.to_lora()
    start = lora.init_lora_weights
    if start == "eva" and continued is None:
        setup = set_up(config)
        plan = BatchPlan.from_config(config.data, config.training)
        with batches_of(setup, plan) as batches:
            count = min(INIT_STEPS, planned_steps(config.training, batches.steps_per_epoch))
            attach(setup, (batches[step] for step in range(count)))
        return setup.model
    if isinstance(start, str) and start.startswith(("pissa", "olora")):
        model = checkpoint.load(dtype, quantization=quantization)
    else:
        model = hollow_model(checkpoint, dtype, quantization)
    if continued is not None:
        load_adapter(model, continued)
        return model
    if new_ids:
        lora = with_tokens(lora, new_ids, checkpoint.config)
        add_token_rows(model, new_ids)
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(config.training.seed))
    return model
