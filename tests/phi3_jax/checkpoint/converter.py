"""GGUF files of tiny Phi-3s and of PEFT adapters, as llama.cpp's own converters write them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import transformers
from safetensors.numpy import load_file

# PyTorch's names of the modules of one layer, and GGUF's.
NAMES = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.down_proj` as `blk.0.ffn_down.weight`."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if name in top:
        return f"{top[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def write_model(base: transformers.Phi3ForCausalLM, file: Path) -> None:
    """The base in float32, with a vocabulary of single-letter pieces."""
    config = base.config
    writer = gguf.GGUFWriter(file, "phi3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_sliding_window(0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>"]
    pieces = [chr(0x4E00 + i) for i in range(config.vocab_size - len(special))]
    writer.add_token_list([*special, *pieces])
    writer.add_token_scores([0.0] * config.vocab_size)
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*types, *[gguf.TokenType.NORMAL] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, value in base.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(gguf_name(name.removesuffix(".weight")), value.float().numpy())
    _finish(writer)


def write_adapter(folder: Path, file: Path) -> None:
    """A PEFT adapter, converted as llama.cpp's `convert_lora_to_gguf.py` does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(file, "phi3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        writer.add_tensor(f"{gguf_name(name)}.lora_{part[0].lower()}", value)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
