"""A QLoRA run from end to end."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import lora_flax
import phi3_jax
from phi3_jax.checkpoint.adapters import load_with_adapter
from phi3_jax.cli import main as cli
from phi3_jax.config.loader import RunConfig
from phi3_jax.training.loop import train
from phi3_jax.training.setup import attach, set_up
from tests.conftest import forward, tiny_hf_model
from tests.phi3_jax.checkpoint.test_bitsandbytes import SHAPE, TOKENS, logits_of
from tests.phi3_jax.conftest import make_config


@pytest.fixture(scope="module")
def qlora(tmp_path_factory, checkpoint, chats):
    """A finished QLoRA run: its config and its folder."""
    directory = tmp_path_factory.mktemp("qlora")
    model = tiny_hf_model(**SHAPE | {"vocab_size": 32064, "initializer_range": 0.1,
                                     "eos_token_id": 32000, "pad_token_id": 32000})  # fmt: skip
    model.save_pretrained(directory / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "base" / name).write_bytes((checkpoint / name).read_bytes())
    config = make_config(directory / "base", chats, directory / "run", {"test_size": 3})
    raw = config.model_dump()
    raw["model"]["quantization"] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    raw["peft"]["init_lora_weights"] = "loftq"
    config = RunConfig.model_validate(raw)
    return config, train(config)


def test_a_qlora_run_ends_in_an_adapter_for_bitsandbytes(qlora):
    config, result = qlora
    assert result.evaluations[6]["eval_loss"] < result.evaluations[0]["eval_loss"] - 0.1
    fields = json.loads((result.adapter / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == config.model.path
    quantization = json.loads((result.adapter / "quantization_config.json").read_text())
    given = transformers.BitsAndBytesConfig.from_dict(quantization)
    assert given.load_in_4bit and given.bnb_4bit_quant_type == "nf4"
    assert given.bnb_4bit_use_double_quant
    card = (result.adapter / "README.md").read_text()
    assert "quantization_config" in card

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=given, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(theirs, result.adapter)
    ours = load_with_adapter(phi3_jax.Checkpoint.open(config.model.path), result.adapter, "float32")
    base = ours.model.layers.mlp.down_proj.base
    assert lora_flax.adapter_names(ours) and isinstance(base, lora_flax.QuantizedDense)
    np.testing.assert_allclose(forward(ours, TOKENS), logits_of(theirs), rtol=0, atol=2e-3)


def test_merging_saves_what_was_trained(qlora, tmp_path, capsys):
    config, result = qlora
    ours = load_with_adapter(phi3_jax.Checkpoint.open(config.model.path), result.adapter, "float32")
    arguments = ["merge", "--model", config.model.path, "--adapter", str(result.adapter),
                 "--output", str(tmp_path / "merged")]  # fmt: skip
    assert cli.main([*arguments, "--dtype", "float32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits_of(theirs), forward(ours, TOKENS), rtol=0, atol=2e-3)
    assert cli.main([*arguments[:-1], str(tmp_path / "half")]) == 0
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "overrides", [[], ["model.quantization=null", "peft.init_lora_weights=true"]]
)
def test_evaluate_measures_the_quantised_base(qlora, tmp_path, overrides):
    """As the config says, or else the adapter's folder."""
    config, result = qlora
    file = tmp_path / "c.yaml"
    file.write_text(config.to_yaml())
    assert cli.main(["evaluate", "--config", str(file), "--max-new-tokens", "2",
                     "--output", str(tmp_path), *overrides]) == 0  # fmt: skip
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert metrics["adapter"]["loss"] == pytest.approx(result.evaluations[6]["eval_loss"], abs=1e-5)


def test_starts_from_what_quantising_lost(qlora):
    """QERA's start, from the first batches, is nearest to the model that was quantized."""
    config, _ = qlora
    whole = phi3_jax.load(config.model.path)
    apart = {}
    for start in (True, "loftq", "qera"):
        peft_section = config.peft.model_copy(update={"init_lora_weights": start})
        run = config.model_copy(update={"peft": peft_section})
        setup = set_up(run)
        tokens = [setup.train.examples[i].tokens[:24] for i in range(4)]
        positions = np.broadcast_to(np.arange(24, dtype=np.int32), (1, 4, 24))
        ones = np.ones((1, 4, 24), np.int32)
        batch = {"tokens": np.stack(tokens)[None], "segment_ids": ones, "positions": positions}
        attach(setup, [batch])
        rows = jnp.asarray(batch["tokens"][0])
        wanted, found = whole.hidden_states(rows), setup.model.hidden_states(rows)
        apart[start] = float(jnp.linalg.norm(found - wanted))
    assert apart["qera"] < 0.9 * apart["loftq"] and apart["loftq"] < apart[True]
