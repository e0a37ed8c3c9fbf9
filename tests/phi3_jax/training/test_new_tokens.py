"""`data.add_tokens`: from the text of a row to the same logits in PEFT."""

from __future__ import annotations

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint.adapters import load_with_adapter
from phi3_jax.checkpoint.vocabulary import add_token_rows, rows_with, with_tokens
from phi3_jax.cli import main as cli
from phi3_jax.evaluation.metrics import evaluate
from phi3_jax.training.loop import train
from phi3_jax.training.sweep.run import train_sweep
from tests.conftest import forward, tiny_hf_model
from tests.phi3_jax.conftest import make_config, save_base

KNOWN = 32011  # tokens of the tokenizer; the checkpoint has one row more
TOKENS = ["<tool>", {"content": "<|think|>", "special": True}, "zwölf"]
IDS = [KNOWN, KNOWN + 1, KNOWN + 2]
LORA = {"target_modules": ["o_proj"], "r": 2}


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


def config_of(base, output, data=None, peft=None, **training):
    config = make_config(base, base / "chats.jsonl", output, data, **training)
    return config.model_copy(update={"peft": config.peft.model_copy(update=LORA | (peft or {}))})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two steps over rows with new tokens, of an untied or a tied base."""

    @functools.cache
    def run(tied: bool) -> SimpleNamespace:
        own = {"vocab_size": KNOWN + 1, "tie_word_embeddings": tied}
        base = save_base(tmp_path_factory.mktemp("base"), **SMALL | own)
        turns = [
            {"role": "user", "content": "Is it zwölf? <tool>"},
            {"role": "assistant", "content": "<|think|>zwölf<tool> yes"},
        ]
        (base / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        output = tmp_path_factory.mktemp("run")
        config = config_of(base, output, {"add_tokens": TOKENS}, max_steps=2, save_steps=1)
        adapter = train(config).adapter
        return SimpleNamespace(base=base, config=config, adapter=adapter, output=output, tied=tied)

    return run


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def run(runs, request):
    return runs(request.param)


@pytest.fixture
def untied(runs):
    return runs(False)


def tokens_with_new() -> np.ndarray:
    return np.array([[1, 17, *IDS, 31999, IDS[0], 5]], np.int32)


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def ours(run) -> np.ndarray:
    model = load_with_adapter(phi3_jax.Checkpoint.open(run.base), run.adapter, "float32")
    return np.asarray(forward(model, tokens_with_new()))


def test_the_adapter_means_the_same_in_peft(run):
    """By the documented way, and by hand with a resized base."""
    expected = ours(run)
    assert expected.shape[-1] == KNOWN + 3
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(run.adapter))
    assert np.abs(logits(auto, tokens_with_new()) - expected).max() < 2e-4
    base = transformers.AutoModelForCausalLM.from_pretrained(run.base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.adapter)
    base.resize_token_embeddings(len(tokenizer))
    by_hand = peft.PeftModel.from_pretrained(base, str(run.adapter))
    assert np.abs(logits(by_hand, tokens_with_new()) - expected).max() < 2e-4
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<|think|>", "zwölf"]) == IDS
    text = tokenizer("a<tool>b zwölf<|think|>")["input_ids"]
    assert [i for i in text if i >= KNOWN] == [IDS[0], IDS[2], IDS[1]]
    assert tokenizer.decode(IDS, skip_special_tokens=True).split() == ["<tool>zwölf"]


def test_only_the_new_rows_train(run):
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    rows = {key: value for key, value in tensors.items() if ".lora_" not in key}
    modules = ["model.embed_tokens"] + ([] if run.tied else ["lm_head"])
    ending = "token_adapter.trainable_tokens_delta"
    assert sorted(rows) == sorted(f"base_model.model.{module}.{ending}" for module in modules)
    weights = load_file(run.base / "model.safetensors")
    for module in modules:
        new = rows[f"base_model.model.{module}.{ending}"]
        mean = weights[f"{module}.weight"][:KNOWN].mean(0)
        assert new.shape == (3, 32)
        assert (np.abs(new - mean).max(1) > 1e-3).all(), "each of them moved"


def test_every_command_takes_the_adapter(untied, tmp_path, capsys):
    """Its tokenizer and its rows; the base's folder stays as it was."""
    asked = ["--max-new-tokens", "3", "--temperature", "0"]
    assert (
        cli.main(["generate", "Is it zwölf? <tool>", "--model", str(untied.adapter), *asked]) == 0
    )
    expected = ours(untied)
    for source in (
        ["--adapter", str(untied.adapter)],
        ["--run", str(untied.output), "--step", "2"],
    ):
        merged = tmp_path / source[0].strip("-")
        arguments = [*source, "--format", "merged", "--dtype", "float32", "--output", str(merged)]
        assert cli.main(["export", *arguments]) == 0, capsys.readouterr().err
        again = transformers.AutoModelForCausalLM.from_pretrained(merged)
        assert np.abs(logits(again, tokens_with_new()) - expected).max() < 2e-4
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
        assert tokenizer.convert_tokens_to_ids("zwölf") == IDS[2]
    arguments = ["--adapter", str(untied.adapter), "--format", "peft", "--output"]
    assert cli.main(["export", *arguments, str(tmp_path / "peft")]) == 0
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for key, value in load_file(untied.adapter / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(written[key], value)


def test_a_resumed_run_and_an_evaluation(untied, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(untied.output, again)
    shutil.rmtree(again / "checkpoints" / "2")
    shutil.rmtree(again / "adapter")
    config = untied.config.model_copy(
        update={"training": untied.config.training.model_copy(update={"output_dir": str(again)})}
    )
    resumed = train(config, resume=True).adapter / "adapter_model.safetensors"
    assert resumed.read_bytes() == (untied.adapter / "adapter_model.safetensors").read_bytes()
    held = {"test_path": str(untied.base / "chats.jsonl"), "add_tokens": TOKENS}
    (untied.base / "train.jsonl").write_text((untied.base / "chats.jsonl").read_text() * 2)
    held["path"] = str(untied.base / "train.jsonl")
    measured = evaluate(config_of(untied.base, tmp_path / "none", held), untied.adapter, 2)
    assert measured.metrics["adapter"]["loss"] < measured.metrics["base"]["loss"]


def test_training_continues_from_the_adapter(untied, tmp_path):
    """With its tokens, whether or not the config names them again."""
    named = {"adapter_name_or_path": str(untied.adapter)}
    config = config_of(untied.base, tmp_path / "a", {"add_tokens": ["<tool>"]}, named, max_steps=1)
    found = load_file(train(config).adapter / "adapter_model.safetensors")
    before = load_file(untied.adapter / "adapter_model.safetensors")
    assert found.keys() == before.keys()
    assert all((found[key] != before[key]).any() for key in found)
    config = config_of(untied.base, tmp_path / "b", {"add_tokens": ["<new>"]}, named)
    with pytest.raises(UserError, match="does not have '<new>'; only a new adapter"):
        train(config)


def test_each_member_of_a_sweep_trains_the_new_rows(run, tmp_path):
    """As the run that it would be alone, and the same logits in PEFT."""
    config = config_of(run.base, tmp_path, {"add_tokens": TOKENS}, max_steps=2)
    rate = config.training.learning_rate
    swept = type(config.sweep)(learning_rate=[rate, rate / 10])
    adapters = train_sweep(config.model_copy(update={"sweep": swept})).adapters
    same, other = (load_file(a / "adapter_model.safetensors") for a in adapters.values())
    alone = load_file(run.adapter / "adapter_model.safetensors")
    assert same.keys() == other.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.abs(other[name] - value).max() > 1e-4
    adapter = next(iter(adapters.values()))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    assert np.abs(logits(auto, tokens_with_new()) - ours(run)).max() < 2e-4


def test_what_cannot_be_added(untied, tmp_path):
    with pytest.raises(UserError, match=r"'<\|user\|>' is in the vocabulary already; peft.*32010"):
        train(config_of(untied.base, tmp_path / "a", {"add_tokens": ["<|user|>"]}))
    with pytest.raises(ValueError, match="'<a>' is listed twice"):
        config_of(untied.base, tmp_path, {"add_tokens": ["<a>", {"content": "<a>"}]})
    with pytest.raises(ValueError, match="must not be empty"):
        config_of(untied.base, tmp_path, {"add_tokens": [""]})


def test_rows_beyond_the_base_must_all_be_there(untied, tmp_path):
    """The adapter of a model with another vocabulary."""
    shutil.copytree(untied.adapter, tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_config.json"
    fields = json.loads(file.read_text())
    network = phi3_jax.Checkpoint.open(untied.base).config
    assert rows_with(network, untied.adapter) == KNOWN + 3
    for last in (KNOWN + 9, 10**12):
        fields["trainable_token_indices"] = {"embed_tokens": [KNOWN, KNOWN + 1, last]}
        file.write_text(json.dumps(fields))
        with pytest.raises(UserError, match=f"needs an embedding of {last + 1} rows and the base"):
            rows_with(network, tmp_path / "odd")


def test_rows_that_train_otherwise(run):
    """Together with other tokens, and with modules that train in full."""
    network = phi3_jax.Checkpoint.open(run.base).config
    lora = config_of(run.base, run.base, peft={"trainable_token_indices": [5]}).peft.to_lora()
    both = {"model.embed_tokens": [5, 90]} | ({} if run.tied else {"lm_head": [90]})
    assert with_tokens(lora, [90], network).to_json()["trainable_token_indices"] == both
    for saved in (["lm_head", "embed_tokens"], ["embed_tokens"]):
        lora = config_of(run.base, run.base, peft={"modules_to_save": saved}).peft.to_lora()
        if run.tied and len(saved) == 1:
            with pytest.raises(UserError, match="list both embed_tokens and lm_head, or neither"):
                with_tokens(lora, [90], network)
            continue
        left = None if len(saved) == 2 else {"lm_head": [90]}
        assert with_tokens(lora, [90], network).to_json()["trainable_token_indices"] == left


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_new_rows_of_modules_that_train_in_full(run, tmp_path):
    whole = {"modules_to_save": ["lm_head", "embed_tokens"]}
    config = config_of(run.base, tmp_path, {"add_tokens": TOKENS}, whole, max_steps=1)
    adapter = train(config).adapter
    model = load_with_adapter(phi3_jax.Checkpoint.open(run.base), adapter, "float32")
    expected = np.asarray(forward(model, tokens_with_new()))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    assert np.abs(logits(auto, tokens_with_new()) - expected).max() < 2e-4


def test_spare_rows_are_used_first():
    hf = tiny_hf_model(vocab_size=40, num_hidden_layers=1)
    network = phi3_jax.Phi3Config.from_hf(hf.config.to_dict(), "config.json")
    model = phi3_jax.Phi3(network, rngs=nnx.Rngs(0))
    before = np.asarray(model.model.embed_tokens.embedding[...])
    add_token_rows(model, [30, 31])
    after = np.asarray(model.model.embed_tokens.embedding[...])
    assert after.shape == before.shape
    np.testing.assert_array_equal(np.delete(after, [30, 31], 0), np.delete(before, [30, 31], 0))
    np.testing.assert_allclose(after[30], before[:30].mean(0), atol=1e-6)
    with pytest.raises(UserError, match="45 tokens before the new ones"):
        add_token_rows(model, [45])
