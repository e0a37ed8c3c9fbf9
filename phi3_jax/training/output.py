"""A run's output folder: checks before the run, and the adapter written at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

import lora_flax
from phi3_jax.checkpoint.adapters import write_quantization
from phi3_jax.checkpoint.readers import merge_first
from phi3_jax.config.loader import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.model.network import Phi3
from phi3_jax.sharding.processes import on_first
from phi3_jax.training.card import write_card


def check_output(output: Path, resume: bool) -> None:
    """Create the folder, on the first process only.

    Raises:
        UserError: the folder contains an earlier run and `resume` is false, or `resume` is true
            and the folder contains no checkpoint.
    """
    on_first(lambda: _make_output(output, resume))


def _make_output(output: Path, resume: bool) -> None:
    saved = output / "checkpoints"
    has_checkpoints = saved.is_dir() and any(p.name.isdigit() for p in saved.iterdir())
    if has_checkpoints and not resume:
        raise UserError(
            f"{output} holds the checkpoints of an earlier run: pass --resume to continue it, or "
            "choose another training.output_dir"
        )
    if resume and not has_checkpoints:
        raise UserError(f"{output}: no checkpoint to resume from")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.output_dir: {error}") from None


class Trained(Protocol):
    """What is exported: a model with its adapter, its tokenizer, and the run's config."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    model: Phi3


def export_adapter(
    setup: Trained, config: RunConfig, adapter: Path, results: dict[str, dict[str, float]]
) -> str | None:
    """Write the PEFT adapter with its model card and tokenizer, on the first process only.

    Args:
        setup: the run, whose model holds the trained adapter.
        config: the training config, for the card.
        adapter: folder to write.
        results: held-out metrics keyed by when they were measured.

    Returns:
        A line to print that names the programs that do not read this adapter as it was trained, if
        there are any.
    """
    exported = lora_flax.to_peft(
        setup.model,
        base_model_name_or_path=base_name(setup.config.model.path),
        keep_rslora=config.peft.keep_rslora,
    )

    def write_rest() -> None:
        adapter.mkdir(parents=True, exist_ok=True)
        if (quantization := config.model.bitsandbytes) is not None:
            write_quantization(quantization, adapter)
        _write_tokenizer(setup.tokenizer, adapter)
        write_card(adapter, config, exported.config, results)

    on_first(write_rest)
    # Last, ending with adapter_config.json: a folder that has it is a complete adapter.
    exported.save(adapter)
    return merge_first(exported.config)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            target = adapter / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            lora_flax.write_atomically(target, file.read_bytes())


def base_name(path: str) -> str:
    """A hub id unchanged; a folder as an absolute path, valid from any working directory."""
    return str(Path(path).expanduser().absolute()) if Path(path).expanduser().is_dir() else path
