"""A PEFT adapter as a GGUF adapter, which llama.cpp loads beside a GGUF of the base (`--lora`).

llama.cpp scales each pair by `alpha / rows of A`, with one alpha for the whole file. Where pairs
have other scales, B is multiplied by the difference.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import lora_flax
from phi3_jax.checkpoint.layerwise import Layerwise
from phi3_jax.errors import UserError
from phi3_jax.export.gguf_file import Check, GGUFTensor, write_gguf
from phi3_jax.export.gguf_model import ARCHITECTURE, tensor_name
from phi3_jax.model.config import Phi3Config

_PREFIX = "base_model.model."
_A = re.compile(r"\.lora_(?:embedding_A|A\.weight)$")


def write_adapter(stream: Layerwise, path: Path, kind: str, name: str) -> Check:
    """Write the adapter of a model.

    Args:
        stream: the model with its adapter.
        path: the file to write.
        kind: a key of `TYPES` that is not quantized.
        name: the adapter's name.

    Raises:
        UserError: an adapter with more than pairs (DoRA, `lora_bias`, whole modules, trained
            tokens), or one that llama.cpp would apply elsewhere.
    """
    # PEFT's form has one pair for each of the network's layers, whatever slices were trained.
    adapter = lora_flax.to_peft(stream.model)
    fields, tensors = adapter.config, adapter.tensors
    _refuse(fields, tensors.keys(), stream.model.config)
    modules = {_A.sub("", key): key for key in sorted(tensors) if _A.search(key)}
    names = [module.removeprefix(_PREFIX) for module in modules]
    pairs = [_pair(tensors, key) for key in modules.values()]
    # llama.cpp's scale of a pair is alpha / rows of A. Most pairs need no change of B.
    ranks = [b.shape[1] for _, b in pairs]
    alphas = [_scale(fields, name) * rank for name, rank in zip(names, ranks, strict=True)]
    alpha = max(set(alphas), key=alphas.count)
    arrays = []
    for (a, b), own in zip(pairs, alphas, strict=True):
        arrays += [a, b if own == alpha else b * np.float32(own / alpha)]
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    files = [f"{tensor_name(own)}.lora_{part}" for own in names for part in "ab"]
    plan = [GGUFTensor(f, x.shape, kind) for f, x in zip(files, arrays, strict=True)]
    return write_gguf(path, writer, plan, arrays)


def _pair(tensors: dict[str, np.ndarray], key: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B as llama.cpp has them: A `[r, in]`, B `[out, r]`; of an embedding, A `[V, r]`."""
    a, b = tensors[key], tensors[re.sub("lora_(embedding_)?A", r"lora_\1B", key)]
    return (np.ascontiguousarray(a.T) if "lora_embedding" in key else a), b


def _scale(fields: dict[str, Any], module: str) -> float:
    """What PEFT multiplies this module's update by."""
    rank = _by_pattern(fields.get("rank_pattern"), module, fields["r"])
    alpha = _by_pattern(fields.get("alpha_pattern"), module, fields["lora_alpha"])
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _by_pattern(pattern: dict[str, float] | None, module: str, usual: float) -> float:
    """PEFT's `get_pattern_key`: a key is a regular expression that matches the end of the name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(usual)


def _refuse(fields: dict[str, Any], keys: Iterable[str], config: Phi3Config) -> None:
    problems = [name for name in ("use_dora", "lora_bias") if fields.get(name)]
    problems += [
        f"{name} {json.dumps(fields[name])}"
        for name in ("modules_to_save", "trainable_token_indices")
        if fields.get(name)
    ]
    if fields.get("bias", "none") != "none":
        problems.append(f"bias {fields['bias']}")
    pairs = re.compile(r"\.lora_(?:embedding_[AB]|[AB]\.weight)$")
    others = [key.removeprefix(_PREFIX) for key in keys if not pairs.search(key)]
    if others and not problems:
        problems.append(", ".join(others))
    if config.tie_word_embeddings and any("lora_embedding_A" in key for key in keys):
        problems.append("an update of an embedding that is also the head")
    if config.tie_word_embeddings and any(".lm_head.lora_" in key for key in keys):
        problems.append("an update of a head that is tied to the embedding")
    if problems:
        raise UserError(
            f"a GGUF adapter has pairs of A and B only, and this one has {'; '.join(problems)}: "
            "use --format merged, or --format gguf, which merges it first"
        )
