"""Which programs read an adapter as it was trained, and what the others need.

The rules are those of the programs' sources (docs/pytorch.md has the table and says what is
tested). All of them read a file whose pairs have one rank and one scale; most features beyond that
are PEFT's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.model.config import Phi3Config

# The values that vLLM accepts for --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Options that add tensors other than A and B.
_BESIDE_PAIRS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "bias")
# The beginning of every `rope_note`.
_ROPE_NOTE = "Trained with LongRoPE's "
_UNUSED: tuple[Any, ...] = (None, False, "none", [], {})


def readers(config: Mapping[str, Any]) -> dict[str, str]:
    """What each program makes of an adapter.

    Args:
        config: the fields of its `adapter_config.json`.

    Returns:
        A sentence by program. It begins with "merge first" for a program that refuses the adapter
        or would compute something else with it.
    """
    rank, flag = config["r"], _vllm_flag(config)
    vllm = f"`--enable-lora --max-lora-rank {flag}`"
    if (reason := _vllm_reason(config, flag)) is not None:
        vllm = f"merge first: {reason}"
    sglang = f"`--enable-lora --max-lora-rank {rank}`"
    if (reason := _sglang_reason(config)) is not None:
        sglang = f"merge first: {reason}"
    gguf = "`phi3-jax export --format gguf-adapter`, or llama.cpp's own converter"
    # It divides by the rows of each A, so rank_pattern alone is read correctly.
    if ignored := _in_use(config, ("alpha_pattern", "use_rslora")):
        gguf = (
            f"`phi3-jax export --format gguf-adapter`; llama.cpp's own converter ignores {ignored}"
        )
    if (reason := _llama_cpp_reason(config)) is not None:
        gguf = f"merge first: {reason}"
    own_loader = _transformers_reason(config)
    return {
        "PEFT": "as it is",
        "transformers": "as it is" if own_loader is None else f"load it with PEFT: {own_loader}",
        "vLLM": vllm,
        "SGLang": sglang,
        "llama.cpp and Ollama": gguf,
        "MLX": "merge first: mlx-lm reads adapters in its own format only",
    }


def merge_first(config: Mapping[str, Any]) -> str | None:
    """One line that names the programs that need a merged model because of an option."""
    own_loader = _transformers_reason(config)
    reasons = {
        "transformers": None if own_loader is None else f"or load it with PEFT: {own_loader}",
        "vLLM": _vllm_reason(config, _vllm_flag(config)),
        "SGLang": _sglang_reason(config),
        "llama.cpp": _llama_cpp_reason(config),
    }
    named = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    if not named:
        return None
    right = "PEFT and transformers" if own_loader is None else "PEFT"
    return (
        f"this adapter is read as trained by {right}; merge it (phi3-jax merge) for "
        + ", ".join(named)
    )


def rope_note(network: Phi3Config, longest: int | None) -> str | None:
    """Which settings of a server mean the LongRoPE factors that an adapter was trained with.

    Args:
        network: the base model, with the choice of factors that the adapter was trained with.
        longest: tokens of the longest training row; None if unknown.

    Returns:
        Sentences; None without LongRoPE, or where the factors never change.
    """
    original, most = network.original_max_position_embeddings, network.max_position_embeddings
    if network.longrope is None or most <= original:
        return None
    choice = network.longrope.choice
    short = (
        f"with a context of at most {original} tokens (vLLM `--max-model-len {original}`, "
        f"llama.cpp `--ctx-size {original}`, Ollama `num_ctx {original}`)"
    )
    if choice == "long":
        return (
            f"{_ROPE_NOTE}long factors for every text. Serve with a context above "
            f"{original} tokens (vLLM `--max-model-len`, llama.cpp `--ctx-size`, Ollama "
            f"`num_ctx`), up to {most}; with phi3-jax, pass `--rope-factors long`. transformers "
            f"takes the short factors for texts of up to {original} tokens; to change that, set "
            "`short_factor` to `long_factor` in the base model's config.json."
        )
    if choice == "short":
        return (
            f"{_ROPE_NOTE}short factors for every text. Serve {short}; with phi3-jax, "
            "pass `--rope-factors short`. transformers takes the long factors for texts beyond "
            f"{original} tokens; to change that, set `long_factor` to `short_factor` in the base "
            "model's config.json."
        )
    if longest is not None and longest <= original:
        return (
            f"{_ROPE_NOTE}short factors only, for no row is longer than {longest} "
            f"tokens. Serve {short}: with a longer one, vLLM and llama.cpp take the long factors "
            f"for every text. transformers and phi3-jax take the short ones up to {original} "
            "tokens by themselves."
        )
    per = "batch" if choice == "by_batch" else "text"
    return (
        f"{_ROPE_NOTE}short factors up to {original} tokens and its long factors "
        f"beyond, chosen for each {per}, as transformers does. vLLM and llama.cpp use one of them "
        f"for all texts: the short ones {short}, and with a longer context the long ones, which "
        "match only texts beyond that length."
    )


def rope_note_beside(adapter: Path) -> str | None:
    """The `rope_note` in the card beside an adapter, which its run wrote; None if it has none."""
    card = adapter / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(_ROPE_NOTE)), None)


def _vllm_flag(config: Mapping[str, Any]) -> int | None:
    return next((size for size in _VLLM_RANKS if size >= config["r"]), None)


def _transformers_reason(config: Mapping[str, Any]) -> str | None:
    if config.get("use_dora"):
        return "its own from_pretrained and load_adapter ignore the magnitudes of use_dora"
    return None


def _vllm_reason(config: Mapping[str, Any], flag: int | None) -> str | None:
    if refused := _in_use(config, _BESIDE_PAIRS):
        return f"it refuses {refused}"
    if ignored := _in_use(config, ("rank_pattern", "alpha_pattern")):
        return f"it ignores {ignored}"
    if flag is None:
        return f"its highest --max-lora-rank is {_VLLM_RANKS[-1]}"
    return None


def _sglang_reason(config: Mapping[str, Any]) -> str | None:
    options = (*_BESIDE_PAIRS, "rank_pattern", "alpha_pattern", "use_rslora")
    unread = _in_use(config, options)
    return f"it scales all pairs by lora_alpha / r and ignores {unread}" if unread else None


def _llama_cpp_reason(config: Mapping[str, Any]) -> str | None:
    refused = _in_use(config, _BESIDE_PAIRS)
    return f"it does not read {refused}" if refused else None


def _in_use(config: Mapping[str, Any], options: Iterable[str]) -> str:
    return " and ".join(name for name in options if config.get(name) not in _UNUSED)
