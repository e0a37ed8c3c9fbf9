"""Adapters and the base models that they belong to.

An adapter's folder names its base in adapter_config.json. If the base was quantized, its settings
are saved next to the adapter and restored with it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from lora_flax import BitsAndBytesConfig
from phi3_jax.checkpoint.bitsandbytes import parse_quantization
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.hub import find_file, is_repo_id, resolve
from phi3_jax.checkpoint.mistaken import hint
from phi3_jax.checkpoint.saving import write_json
from phi3_jax.checkpoint.vocabulary import ADAPTER_CONFIG, load_adapter
from phi3_jax.errors import UserError
from phi3_jax.model.config import RopeFactors, read_json_object
from phi3_jax.model.network import Phi3

# The base's quantization settings, as in a config.json.
QUANTIZATION_FILE = "quantization_config.json"


@dataclasses.dataclass(frozen=True)
class Named:
    """What a model's path stands for.

    Attributes:
        base: folder or hub id of the base model.
        revision: revision of the base on the hub.
        adapter: folder of the adapter, if the path is an adapter's.
    """

    base: str
    revision: str | None
    adapter: Path | None


def named_model(path_or_repo_id: str | Path, revision: str | None = None) -> Named:
    """A model as it is, an adapter as the base that it names and itself, as transformers does.

    Args:
        path_or_repo_id: folder or hub id of a model or of a PEFT adapter.
        revision: its revision on the hub.

    Raises:
        UserError: an adapter that names no base model, or one that does not exist.
    """
    file = find_file(path_or_repo_id, ADAPTER_CONFIG, revision)
    if file is None:
        return Named(str(path_or_repo_id), revision, None)
    fields = read_json_object(file)
    base, instead = fields.get("base_model_name_or_path"), "give the base model as the model"
    if not base or not isinstance(base, str):
        raise UserError(
            f"{path_or_repo_id} is a PEFT adapter that names no base model; {instead} and this "
            "folder as the adapter (--adapter, or peft.adapter_name_or_path in a config)"
        )
    local = Path(base).expanduser()
    missing = not local.is_dir() and (local.is_absolute() or base.startswith((".", "~")))
    if missing or find_file(base, ADAPTER_CONFIG) is not None:
        problem = "does not exist here" if missing else "is itself an adapter"
        raise UserError(
            f"{path_or_repo_id} is a PEFT adapter of {base}, which {problem}; {instead} and this "
            "folder as the adapter (--adapter, or peft.adapter_name_or_path in a config)"
        )
    found = fields.get("revision")
    return Named(base, str(found) if found else None, resolve(path_or_repo_id, revision))


def open_with_adapter(model: str, adapter: str | None) -> tuple[Checkpoint, Path | None]:
    """Open a model and find its adapter's folder.

    Where the adapter names this model as its base, the model has the revision that it names.

    Args:
        model: folder or hub id of a base model, or of an adapter that names its base.
        adapter: folder or hub id of an adapter.

    Raises:
        UserError: one of them does not exist, or `model` is another adapter.
    """
    named = named_model(model)
    folder = resolve(adapter) if adapter else named.adapter
    if folder and named.adapter and folder.resolve() != named.adapter.resolve():
        raise UserError(
            f"{model} is a PEFT adapter and {adapter} another one; give the base model, "
            f"{named.base}, with the adapter"
        )
    if folder is not None:
        require_adapter(folder)
    return Checkpoint.open(named.base, named.revision or revision_of(named.base, folder)), folder


def revision_of(base: str, adapter: Path | None) -> str | None:
    """The revision of a base model on the hub that an adapter names; None if it names another."""
    if adapter is None or not is_repo_id(base):
        return None
    fields = read_json_object(adapter / ADAPTER_CONFIG)
    found = fields.get("revision") if fields.get("base_model_name_or_path") == base else None
    return str(found) if found else None


def require_adapter(path_or_repo_id: str | Path) -> None:
    """Check that this is a PEFT adapter, and say what it is otherwise.

    Raises:
        UserError: it is not.
    """
    if find_file(path_or_repo_id, ADAPTER_CONFIG) is not None:
        return
    folder = resolve(path_or_repo_id)
    found = hint(folder)
    said = f"{folder} is not a PEFT adapter: it has no {ADAPTER_CONFIG}"
    raise UserError(f"{said}; {found}" if found else said)


def load_with_adapter(
    base: Checkpoint,
    adapter: Path | None,
    dtype: jnp.dtype | str,
    rope_factors: RopeFactors = "by_text",
) -> Phi3:
    """Load a base with an adapter, quantized the way it was when the adapter was trained.

    Args:
        base: the base model.
        adapter: folder of the adapter; None loads the base alone.
        dtype: dtype of the weights.
        rope_factors: as in `Checkpoint.load`.

    Raises:
        UserError, lora_flax.LoraError: as in `Checkpoint.load`, or the adapter does not match
            the model.
    """
    quantization = None
    if adapter is not None and base.quantization is None:
        quantization = read_quantization(adapter)
    model = base.load(dtype, quantization=quantization, rope_factors=rope_factors)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def write_quantization(quantization: BitsAndBytesConfig, adapter: Path) -> None:
    """Save the base's quantization settings next to an adapter."""
    write_json(quantization.to_json(), adapter / QUANTIZATION_FILE)


def read_quantization(adapter: Path) -> BitsAndBytesConfig | None:
    """The quantization settings of an adapter's base, or None.

    Raises:
        UserError: the file does not hold quantization settings.
    """
    file = adapter / QUANTIZATION_FILE
    return parse_quantization(read_json_object(file), file) if file.exists() else None
