"""A Phi-3 as a GGUF file of llama.cpp's architecture `phi3`.

The network's fused projections are those of llama.cpp, so that a tensor is a Hugging Face tensor
under another name. A tied head is left out, as llama.cpp expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from phi3_jax.checkpoint.layerwise import Layerwise
from phi3_jax.checkpoint.names import HFTensor
from phi3_jax.errors import UserError
from phi3_jax.export.gguf_file import PLAIN, TYPES, Check, GGUFTensor, fitting_kind, write_gguf
from phi3_jax.export.gguf_tokenizer import add_tokenizer, strips_after_special
from phi3_jax.model.config import Phi3Config

ARCHITECTURE = "phi3"
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensor_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face weight, both with `.weight` at the end."""
    module = name.removesuffix(".weight")
    if module in _OUTER:
        return f"{_OUTER[module]}.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[rest]}.weight"


def write_model(
    stream: Layerwise,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    path: Path,
    kind: str,
    name: str,
    say: Callable[[str], None],
) -> Check:
    """Write the merged model.

    Args:
        stream: the model and its adapter, if any.
        tokenizer: its tokenizer, with the chat template.
        stops: the token ids that end an answer.
        path: the file to write.
        kind: a key of `TYPES`. Vectors are always float32, and with 4 and 5 bits the embedding and
            the head have 8, like those that llama.cpp's own tool writes have more than the rest.
        name: the model's name.
        say: receives a line for what llama.cpp computes otherwise.

    Raises:
        UserError: a network or tokenizer that llama.cpp's architecture cannot express.
    """
    config, table, arrays = stream.merged()
    _refuse(config)
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(_safe_name(name, strips_after_special(tokenizer)))
    _add_network(writer, config)
    writer.add_file_type(_file_type(kind))
    if kind not in PLAIN:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, config.vocab_size, stops, say)
    factors = _factors(config)
    tensors = [GGUFTensor(n, values.shape, "float32") for n, values in factors.items()]
    tensors += [_plan(tensor, kind) for tensor in table]
    for line in _remarks(config, tensors, kind):
        say(line)
    return write_gguf(path, writer, tensors, _in_turn(factors, arrays))


def _in_turn(factors: dict[str, np.ndarray], arrays: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield from factors.values()
    yield from arrays


def _plan(tensor: HFTensor, kind: str) -> GGUFTensor:
    name = tensor_name(tensor.name)
    if name in ("token_embd.weight", "output.weight") and kind not in PLAIN:
        kind = "q8_0"
    return GGUFTensor(name, tensor.shape, fitting_kind(tensor.shape, kind))


def _refuse(config: Phi3Config) -> None:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"llama.cpp's phi3 needs head_dim x num_attention_heads = hidden_size, which are "
            f"{config.head_dim}, {config.num_attention_heads} and {config.hidden_size} here"
        )


def _add_network(writer: Any, config: Phi3Config) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window or 0)
    if config.longrope is not None:
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(config.longrope.attention_factor)


def _factors(config: Phi3Config) -> dict[str, np.ndarray]:
    """LongRoPE's factors, which llama.cpp chooses between by the size of its context."""
    if config.longrope is None:
        return {}
    return {
        "rope_factors_long.weight": np.asarray(config.longrope.long_factor, np.float32),
        "rope_factors_short.weight": np.asarray(config.longrope.short_factor, np.float32),
    }


def _remarks(config: Phi3Config, tensors: list[GGUFTensor], kind: str) -> list[str]:
    lines = []
    if config.sliding_window is not None:
        lines.append(
            f"llama.cpp ignores phi3's sliding window: answers are those of this model up to "
            f"{config.sliding_window} tokens"
        )
    if config.longrope is not None:
        original = config.original_max_position_embeddings
        lines.append(
            f"llama.cpp takes LongRoPE's long factors if its context (-c) is above {original} "
            "tokens, whatever the length of the text, and the short ones otherwise"
        )
    odd = [t.name for t in tensors if t.kind == "float16" and kind != "float16"]
    if odd:
        lines.append(
            f"{len(odd)} tensors are float16, for their rows do not divide into blocks of {kind}"
        )
    return lines


def _file_type(kind: str) -> Any:
    return gguf.LlamaFileType["ALL_F32" if kind == "float32" else f"MOSTLY_{TYPES[kind]}"]


def _safe_name(name: str, strips: bool) -> str:
    """A name by which llama.cpp treats the special tokens as the tokenizer does.

    If `general.name` has phi-3 or phi3 in it, llama.cpp strips white space after special tokens,
    and needs Phi-3's own tokens.
    """
    lower = name.lower()
    if ("phi-3" in lower or "phi3" in lower) == strips:
        return name
    if strips:
        return f"Phi-3 {name}"
    for spelling, other in (("hi-3", "hi 3"), ("hi3", "hi 3"), ("HI-3", "HI 3"), ("HI3", "HI 3")):
        name = name.replace(spelling, other)
    return name
