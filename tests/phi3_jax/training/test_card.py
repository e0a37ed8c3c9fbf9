"""What the card and the log say about the programs that read an adapter."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from flax import nnx

import lora_flax
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.training.output import export_adapter
from tests.phi3_jax.conftest import make_config


@pytest.mark.parametrize(
    ("peft", "merged_for", "in_card"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, None, "vLLM: `--enable-lora"),
        ({"use_rslora": True}, None, "vLLM: `--enable-lora"),
        ({"use_rslora": True, "keep_rslora": True}, "SGLang", "own converter ignores use_rslora"),
        ({"alpha_pattern": {"o_proj": 3}}, "vLLM", "vLLM: merge first: it ignores alpha_pattern"),
        ({"use_dora": True}, "llama.cpp", "vLLM: merge first: it refuses use_dora"),
    ],
    ids=str,
)
def test_what_other_programs_make_of_it(checkpoint, chats, tmp_path, peft, merged_for, in_card):
    config = make_config(checkpoint, chats, tmp_path)
    config = config.model_copy(update={"peft": config.peft.model_copy(update=peft)})
    model = Checkpoint.open(checkpoint).load("float32")
    lora_flax.wrap(model, config.peft.to_lora(), rngs=nnx.Rngs(0))
    tokenizer = load_tokenizer(checkpoint)
    setup = SimpleNamespace(model=model, config=config, tokenizer=tokenizer)
    note = export_adapter(setup, config, tmp_path / "adapter", {})
    assert in_card in (tmp_path / "adapter" / "README.md").read_text()
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["use_rslora"] == config.peft.keep_rslora
    if merged_for is None:
        assert note is None
    else:
        assert note.startswith("this adapter is read as trained by PEFT and transformers; merge it")
        assert f"{merged_for} (" in note
