"""Complete folders: PEFT adapters and merged models, checked after writing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import lora_flax
from phi3_jax.checkpoint.adapters import QUANTIZATION_FILE, revision_of
from phi3_jax.checkpoint.cards import PICTURE, card_data, card_text, terms_of
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.layerwise import Layerwise
from phi3_jax.checkpoint.mistaken import is_run
from phi3_jax.checkpoint.saving import save_tensors
from phi3_jax.checkpoint.vocabulary import ADAPTER_CONFIG
from phi3_jax.data.tokenizer import tokenizer_folder
from phi3_jax.errors import UserError

# A checkpoint's files other than its weights and config.json; no code, no pickle.
_SETTINGS = "generation_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Logits are compared on this many random tokens.
_TOKENS = 24
# Largest difference of logits, relative to the largest logit, by dtype: rounding, not mistakes.
_BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.2}


def write_merged(
    stream: Layerwise,
    base: Checkpoint,
    directory: Path,
    max_shard_size: int,
    card: str,
    adapter: Path | None = None,
) -> str:
    """Write a model folder with the adapter merged in, and check it.

    Args:
        stream: the model and its adapter, if any.
        base: the base model; its generation settings are copied.
        directory: output folder.
        max_shard_size: maximum bytes per file.
        card: text of its README.md.
        adapter: folder of the adapter; the tokenizer and template are its own, or the base's if it
            has none.

    Returns:
        A line that says what was compared.

    Raises:
        UserError: the folder cannot be written, or the written model gives other logits.
    """
    refuse_same(directory, base.directory, "base model")
    _refuse_other(directory, model=True)
    before = stream.logits(sample_tokens(stream))
    config, table, arrays = stream.merged()
    with _removed_if_new(directory):
        _begin(directory, "config.json")
        _copy(tokenizer_folder(base.directory, adapter), directory, _TOKENIZER)
        _copy(base.directory, directory, [_SETTINGS])
        lora_flax.write_atomically(directory / "README.md", card)
        save_tensors(config, table, arrays, stream.dtype, directory, max_shard_size)
        again = Layerwise.open(Checkpoint.open(directory), None, stream.dtype)
        return _compare(before, again.logits(sample_tokens(stream)), directory, stream.dtype.name)


def write_peft(
    stream: Layerwise,
    base: Checkpoint,
    adapter: Path,
    directory: Path,
    base_name: str,
    unfused: bool,
    keep_rslora: bool,
    card: str,
) -> str:
    """Write an adapter again, with its tokenizer and card, and check it.

    Args:
        stream: the model and its adapter, in float32.
        base: the base model.
        adapter: folder of the adapter that `stream` has; its other files are copied, and the base's
            tokenizer if it has none.
        directory: output folder.
        base_name: the base model's name in adapter_config.json.
        unfused: write the projections of fused layers under their own names.
        keep_rslora: write an adapter trained with `use_rslora` as one, not as plain LoRA.
        card: text of README.md, if the adapter has none.

    Returns:
        A line that says what was compared.

    Raises:
        UserError: the folder cannot be written, or the written adapter gives other logits.
    """
    refuse_same(directory, adapter, "adapter")
    _refuse_other(directory, model=False)
    before = stream.logits(sample_tokens(stream))
    with _removed_if_new(directory):
        _begin(directory, ADAPTER_CONFIG)
        _copy(tokenizer_folder(base.directory, adapter), directory, _TOKENIZER)
        _copy(adapter, directory, [QUANTIZATION_FILE, PICTURE])
        readme = adapter / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else card
        lora_flax.write_atomically(directory / "README.md", text)
        lora_flax.save_peft(
            stream.model,
            directory,
            base_model_name_or_path=base_name,
            revision=revision_of(base_name, adapter),
            unfused=unfused,
            keep_rslora=keep_rslora,
        )
        again = Layerwise.open(base, directory, stream.dtype)
        return _compare(before, again.logits(sample_tokens(stream)), directory, stream.dtype.name)


@contextlib.contextmanager
def _removed_if_new(directory: Path) -> Iterator[None]:
    """Leave no half of an export, unless it went into a folder that had been there before."""
    existed = directory.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def sample_tokens(stream: Layerwise) -> np.ndarray:
    """Random token ids `[1, S]`, the same ones each time, the last of the vocabulary among them."""
    config = stream.model.config
    count = min(_TOKENS, config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, count))
    ids[0, 0] = config.vocab_size - 1  # a new token's, if the adapter has any
    return ids.astype(np.int32)


def merged_card(base: str, adapter: str | None, dtype: str, note: str | None = None) -> str:
    """README.md of an exported model, with Hugging Face front matter.

    Args:
        base: name of the base model.
        adapter: name of the adapter that was merged, if any.
        dtype: dtype of the weights.
        note: a paragraph on how to serve it.
    """
    relation = "finetune" if adapter else "quantized"
    data = card_data(base, relation, "transformers", ["phi3", "jax"], **terms_of(base))
    made = f"The LoRA adapter {adapter}, merged into {base}" if adapter else f"A copy of {base}"
    body = f"# {Path(adapter or base).name}\n\n{made} by phi3-jax, in {dtype}.\n"
    if note is not None:
        body += f"\n{note}\n"
    return card_text(data, body)


def _compare(before: np.ndarray, after: np.ndarray, directory: Path, dtype: str) -> str:
    largest, difference = float(np.abs(before).max()), float(np.abs(before - after).max())
    said = (
        f"reloaded: {before.shape[1]} positions x {before.shape[2]} logits differ by at most "
        f"{difference:.1e}; the largest is {largest:.1f}"
    )
    if not difference <= _BOUNDS[dtype] * max(largest, 1.0):
        raise UserError(f"{directory}: the written files give other logits ({said})")
    return said


def refuse_same(directory: Path, source: Path, what: str) -> None:
    """Check that a folder is not written over its own source, which is called `what`.

    Raises:
        UserError: both are the same folder.
    """
    if directory.resolve() == source.resolve():
        raise UserError(f"{directory} is the {what}'s own folder; choose another output folder")


def _refuse_other(directory: Path, model: bool) -> None:
    """Check that a folder holds nothing that would change what the written files mean.

    Raises:
        UserError: a run's folder, a model's for an adapter, an adapter's or one with other
            safetensors for a model.
    """
    own = "model.safetensors", "model-*-of-*.safetensors"
    held = None
    if is_run(directory):
        held = "a run"
    elif model and (directory / ADAPTER_CONFIG).exists():
        held = "a PEFT adapter"
    elif not model and (directory / "config.json").exists():
        held = "a model"
    elif model:
        files = (f for f in directory.glob("*.safetensors") if not any(map(f.match, own)))
        held = next((file.name for file in sorted(files)), None)
    if held is not None:
        raise UserError(f"{directory} holds {held}; choose another output folder")


def _begin(directory: Path, last: str) -> None:
    """Make a folder, or an export in it incomplete until `last`, the last file, is written again.

    Raises:
        UserError: the output folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lora_flax.remove_durably(directory / last)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None


def _copy(source: Path, directory: Path, names: Iterable[str]) -> None:
    """Copy the files of these names, and remove those that the source lacks: an earlier export's.

    Raises:
        UserError: the output folder cannot be written.
    """
    try:
        for name in names:
            if (source / name).is_file():
                lora_flax.write_atomically(directory / name, (source / name).read_bytes())
            else:
                (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
