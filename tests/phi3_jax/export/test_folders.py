"""Merged models: what the adapter gave, transformers gives from the saved folder."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import lora_flax
import phi3_jax
from phi3_jax.checkpoint.layerwise import Layerwise
from phi3_jax.export.folders import write_merged, write_peft
from tests.conftest import forward, tiny_hf_model
from tests.phi3_jax.conftest import TOKENIZER

TOKENS = np.arange(3, 23, dtype=np.int32)[None]


def adapted(directory, base, dtype="float32", **options) -> phi3_jax.Phi3:
    tiny_hf_model(**base).save_pretrained(directory)
    model = phi3_jax.load(directory, dtype=dtype)
    config = lora_flax.LoraConfig(r=4, lora_alpha=8, **options)
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    trained = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trained)
    nnx.update(model, moved)
    return model


def export_merged(model, folder, dtype="float32", max_shard_size=10**9) -> str:
    """From `folder/base`, by way of `folder/adapter`, to `folder/out`."""
    lora_flax.save_peft(model, folder / "adapter", base_model_name_or_path=str(folder / "base"))
    base = phi3_jax.Checkpoint.open(folder / "base")
    stream = Layerwise.open(base, folder / "adapter", dtype)
    return write_merged(stream, base, folder / "out", max_shard_size, "card", folder / "adapter")


@pytest.mark.parametrize(
    ("tied", "options", "still_tied"),
    [
        (False, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, False),
        (True, {"target_modules": ["qkv_proj"]}, True),
        (True, {"target_modules": ["qkv_proj", "embed_tokens"]}, False),
        (True, {"target_modules": ["qkv_proj"], "modules_to_save": ["embed_tokens"]}, False),
        (True, {"target_modules": ["qkv_proj"], "trainable_token_indices": [5, 9]}, True),
        (True, {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]}, False),
        (True, {"target_modules": ["o_proj"], "trainable_token_indices": {"lm_head": [5]}}, False),
        (
            True,
            {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [5]}},
            False,
        ),
        (
            True,
            {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            False,
        ),
    ],
)
def test_merged_model_in_transformers(tmp_path, tied, options, still_tied):
    model = adapted(tmp_path / "base", {"tie_word_embeddings": tied}, **options)
    expected = np.asarray(forward(model, TOKENS))
    assert np.abs(expected - forward(phi3_jax.load(tmp_path / "base"), TOKENS)).max() > 0.1
    said = export_merged(model, tmp_path, max_shard_size=100_000)
    assert "reloaded" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == still_tied
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
    again = forward(phi3_jax.load(tmp_path / "out"), TOKENS)
    np.testing.assert_allclose(again, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_merged_in_python_a_tied_model_is_as_right(tmp_path, options, merged_before):
    model = adapted(tmp_path / "base", {"tie_word_embeddings": True}, **options)
    expected = np.asarray(forward(model, TOKENS))
    if merged_before:
        lora_flax.merge(model)
        np.testing.assert_allclose(forward(model, TOKENS), expected, rtol=0, atol=2e-4)
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(forward(model, TOKENS), expected, rtol=0, atol=2e-4)
    phi3_jax.save(model, tmp_path / "out")
    np.testing.assert_allclose(forward(model, TOKENS), expected, rtol=0, atol=2e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


def test_bfloat16_is_merged_in_float32_and_rounded_once(tmp_path):
    """At most half a unit in the last place of the exact sum; PEFT's own merge, no closer."""
    model = adapted(tmp_path / "base", {}, dtype="bfloat16", target_modules="all-linear")
    export_merged(model, tmp_path, "bfloat16")
    saved = load_file(tmp_path / "out" / "model.safetensors")

    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16
    )
    weights = {n: p.detach().double().numpy() for n, p in base.named_parameters()}
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, merged in theirs.named_parameters():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in tensors:
            continue
        a, b = (tensors[f"{key}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        exact = weights[name] + 2.0 * b @ a
        assert saved[name].dtype == jnp.bfloat16
        ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        ours = np.abs(saved[name].astype(np.float64) - exact) / ulp
        assert ours.max() < 0.51, name
        peers = np.abs(merged.detach().double().numpy() - exact) / ulp
        assert ours.max() <= peers.max() + 0.01


def test_values_that_are_not_finite_are_not_written(tmp_path):
    """float16 ends at 65504; no half of the folder stays."""
    model = adapted(tmp_path / "base", {}, target_modules=["o_proj"])
    large = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf * 1e4, large))
    with pytest.raises(phi3_jax.UserError, match="not finite in float16, which are not written"):
        export_merged(model, tmp_path, "float16")
    assert not (tmp_path / "out").exists()


def described(folder) -> tuple:
    """What decides how transformers makes tokens of a text, and ends an answer."""
    found = transformers.AutoTokenizer.from_pretrained(folder)
    return found.special_tokens_map, found.chat_template, found("a <note> b")["input_ids"]


def test_an_export_has_one_tokenizer(tmp_path):
    """All of the adapter's if it has one, else all of the base's, also over an earlier export."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = adapted(base, {}, target_modules=["o_proj"])
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, base)
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (base / "special_tokens_map.json").write_text(json.dumps(ends))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens("<note>")
    tokenizer.eos_token, tokenizer.pad_token = "<|end|>", "<unk>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    assert described(adapter) != described(base)
    export_merged(model, tmp_path)
    assert described(out) == described(adapter)
    assert (out / "generation_config.json").is_file()

    (adapter / "tokenizer.json").unlink()
    (base / "generation_config.json").unlink()
    export_merged(model, tmp_path)
    assert described(out) == described(base)
    assert {file.name for file in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_an_adapter_over_an_earlier_one_keeps_nothing_of_it(tmp_path):
    """Neither its base's quantization nor its chat template."""
    model = adapted(tmp_path / "base", {}, target_modules=["o_proj"])
    base, out = phi3_jax.Checkpoint.open(tmp_path / "base"), tmp_path / "out"
    for name, quantized in (("first", True), ("second", False)):
        adapter = tmp_path / name
        lora_flax.save_peft(model, adapter, base_model_name_or_path=str(tmp_path / "base"))
        if quantized:
            settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
            (adapter / "quantization_config.json").write_text(json.dumps(settings))
            (adapter / "tokenizer.json").write_text("{}")
            (adapter / "chat_template.jinja").write_text("{{ messages }}")
        stream = Layerwise.open(base, adapter, "float32")
        write_peft(stream, base, adapter, out, "base", False, False, "card")
        assert (out / "quantization_config.json").exists() == quantized
        assert (out / "chat_template.jinja").exists() == quantized
    assert {file.name for file in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
