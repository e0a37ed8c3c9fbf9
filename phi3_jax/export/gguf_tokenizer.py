"""A tokenizer of Hugging Face as the metadata of a GGUF file.

llama.cpp has two tokenizers that matter here: `llama`, which merges like sentencepiece (Phi-3,
Phi-3.5), and `gpt2`, byte-level BPE with one of its known pre-tokenizers (Phi-4, SmolLM2).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from phi3_jax.errors import UserError
from phi3_jax.generation.prompts import encode_chat, encode_text

# llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Never reached: added tokens are found before the text is merged.
_ADDED_SCORE = -1000.0
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A text that each of the pre-tokenizers below splits otherwise.
_PROBE = (
    "Hello worldWide it's IT'S we'LL 7 12345 x1y22 \u00bd\u00b2 na\u00efve \u00c9COLE e\u0301a "
    "\u4f60\u597d  two   spaces\n\nlines \n end?!\n//path/to\n \t(tabs)\r\n...don't a/b "
)


def add_tokenizer(
    writer: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    stops: list[int],
    say: Callable[[str], None],
) -> None:
    """Add the tokenizer and the chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: the checkpoint's tokenizer.
        vocab_size: the rows of the model's embedding; ids without a token become unused ones.
        stops: the token ids that end an answer.
        say: receives a line for what llama.cpp does otherwise.

    Raises:
        UserError: a tokenizer that llama.cpp does not have.
    """
    fields = _fields(tokenizer)
    model, normalizer, before = fields["model"], fields["normalizer"], fields["pre_tokenizer"]
    if model["type"] != "BPE":
        raise UserError(
            f"llama.cpp has no tokenizer for a {model['type']} model here; BPE is needed"
        )
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(normalizer, before, say))
        scores = _scores(model)
    else:
        if normalizer is not None:
            raise UserError(f"llama.cpp has no {normalizer['type']} normalizer for byte-level BPE")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
        scores = None
    tokens, types = _tokens(fields, vocab_size)
    writer.add_token_list(tokens)
    if scores is not None:
        writer.add_token_scores([scores.get(token, _ADDED_SCORE) for token in tokens])
    writer.add_token_types(types)
    _add_special(writer, tokenizer, stops, say)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that `apply_chat_template` uses by default."""
    template: Any = tokenizer.chat_template
    found = template.get("default") if isinstance(template, dict) else template
    return str(found) if found else None


def strips_after_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether white space after a special token vanishes, as in Phi-3's tokenizer."""
    return any(token["rstrip"] and token["special"] for token in _fields(tokenizer)["added_tokens"])


def _fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend: Any = tokenizer
    fields: dict[str, Any] = json.loads(backend.backend_tokenizer.to_str())
    return fields


def _tokens(fields: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The token and its type for each id below `vocab_size`."""
    model = fields["model"]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    known: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in fields["added_tokens"]}
    known |= {content: token["id"] for content, token in added.items()}
    beyond = sorted(token for token, index in known.items() if index >= vocab_size)
    if beyond:
        raise UserError(
            f"the tokenizer has tokens beyond the model's vocabulary of {vocab_size}: {beyond[:5]}"
        )
    for token, index in known.items():
        tokens[index] = token
        types[index] = NORMAL
        if token in added:
            types[index] = CONTROL if added[token]["special"] else USER_DEFINED
        elif model.get("byte_fallback") and _is_byte(token):
            types[index] = BYTE
        if token == model.get("unk_token") or (model.get("byte_fallback") and token == "<unk>"):
            types[index] = UNKNOWN
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """The scores by which sentencepiece chooses what to merge, from the order of the merges.

    tokenizer.json has every way to put a token together as a merge, in the order of the tokens'
    scores. That order is all that merging depends on.
    """
    merges, vocab = _merges(model), model["vocab"]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    present = set(merges)
    for token in ranks:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        missing = [s for s in splits if s[0] in vocab and s[1] in vocab and s not in present]
        if missing:
            raise UserError(
                "llama.cpp merges like sentencepiece, and this tokenizer does not: it has no merge "
                f"of {missing[0][0]!r} and {missing[0][1]!r}"
            )
    return {token: -float(ranks.get(token, 0)) for token in vocab}


def _adds_space(
    normalizer: dict[str, Any] | None, before: dict[str, Any] | None, say: Callable[[str], None]
) -> bool:
    """Whether a space is put before a text, and before each text after a special token."""
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if before is not None and before["type"] == "Metaspace":
        if before.get("prepend_scheme") == "first":
            say(
                "llama.cpp puts a space before the text after each special token, and this "
                "tokenizer only before the first text"
            )
        return bool(before.get("prepend_scheme", "always") != "never")
    return any(part["type"] == "Prepend" for part in parts)


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the rule by which a text is split before merging."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]
        )

    known = {
        "gpt-2": by_words,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_words]),
        "dbrx": split(_CL100K),
        "gpt-4o": split(_O200K),
    }
    backend: Any = tokenizer
    own = backend.backend_tokenizer.pre_tokenizer
    found = None if own is None else own.pre_tokenize_str(_PROBE)
    for name, rule in known.items():
        if rule.pre_tokenize_str(_PROBE) == found:
            return name
    raise UserError(
        "this tokenizer splits texts by a rule that llama.cpp is not known to have; known are "
        "GPT-2's, SmolLM2's, Phi-4's (cl100k) and Phi-4-mini's (o200k)"
    )


def _add_special(
    writer: Any, tokenizer: PreTrainedTokenizerBase, stops: list[int], say: Callable[[str], None]
) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ends = [index for index in stops if index != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[-1])
    if len(ends) > 1:
        say(f"llama.cpp stops at {tokenizer.convert_ids_to_tokens(ends[-1])}; others may be missed")
    # A chat's template is followed: it has written every special token that it wants.
    if tokenizer.chat_template:
        first = encode_chat([{"role": "user", "content": "a"}], tokenizer)
    else:
        first = encode_text("a", tokenizer)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and first[:1] == [bos])
    writer.add_add_eos_token(False)
