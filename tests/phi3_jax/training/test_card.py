"""What the card and the log say about the programs that read an adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
from flax import nnx

import lora_flax
from phi3_jax.checkpoint.adapters import revision_of
from phi3_jax.checkpoint.cards import terms_of
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.readers import rope_note, rope_note_beside
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.model.config import LongRope, Phi3Config
from phi3_jax.report.folder import read_run
from phi3_jax.training import card
from phi3_jax.training.card import write_card
from phi3_jax.training.output import export_adapter
from tests.phi3_jax.conftest import make_config


@pytest.mark.parametrize(
    ("options", "merged_for", "in_card"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, None, "vLLM: `--enable-lora"),
        ({"use_rslora": True}, None, "vLLM: `--enable-lora"),
        ({"use_rslora": True, "keep_rslora": True}, "SGLang", "own converter ignores use_rslora"),
        ({"alpha_pattern": {"o_proj": 3}}, "vLLM", "vLLM: merge first: it ignores alpha_pattern"),
        ({"use_dora": True}, "llama.cpp", "vLLM: merge first: it refuses use_dora"),
    ],
    ids=str,
)
def test_what_other_programs_make_of_it(checkpoint, chats, tmp_path, options, merged_for, in_card):
    config = make_config(checkpoint, chats, tmp_path)
    config = config.model_copy(update={"peft": config.peft.model_copy(update=options)})
    model = Checkpoint.open(checkpoint).load("float32")
    lora_flax.wrap(model, config.peft.to_lora(), rngs=nnx.Rngs(0))
    tokenizer = load_tokenizer(checkpoint)
    setup = SimpleNamespace(model=model, config=config, tokenizer=tokenizer)
    note = export_adapter(setup, config, tmp_path / "adapter", 6, {}, tmp_path)
    assert in_card in (tmp_path / "adapter" / "README.md").read_text()
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["use_rslora"] == config.peft.keep_rslora
    if merged_for is None:
        assert note is None
    else:
        programs = "PEFT" if "use_dora" in options else "PEFT and transformers"
        assert note.startswith(f"this adapter is read as trained by {programs}; merge it")
        assert f"{merged_for} (" in note


def test_the_bases_revision_goes_with_the_adapter(checkpoint, chats, tmp_path):
    """PEFT loads the base at the revision in adapter_config.json."""
    config = make_config(checkpoint, chats, tmp_path)
    model = Checkpoint.open(checkpoint).load("float32")
    lora_flax.wrap(model, config.peft.to_lora(), rngs=nnx.Rngs(0))
    on_hub = config.model.model_copy(update={"path": "user/base", "revision": "v2"})
    setup = SimpleNamespace(
        model=model,
        config=config.model_copy(update={"model": on_hub}),
        tokenizer=load_tokenizer(checkpoint),
    )
    export_adapter(setup, config, tmp_path / "adapter", 6, {}, tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (loaded.base_model_name_or_path, loaded.revision) == ("user/base", "v2")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("user/base", revision="v2")' in card
    assert revision_of("user/base", tmp_path / "adapter") == "v2"
    assert revision_of("user/other", tmp_path / "adapter") is None


LONG = Phi3Config(max_position_embeddings=131072, longrope=LongRope((1.0,) * 48, (2.0,) * 48, 1.19))


@pytest.mark.parametrize(
    ("choice", "longest", "said"),
    [
        ("by_text", 2000, "no row is longer than 2000 tokens. Serve with a context of at most 4096 "
         "tokens (vLLM `--max-model-len 4096`, llama.cpp `--ctx-size 4096`"),
        ("by_batch", 9000, "chosen for each batch, as transformers does"),
        ("by_text", None, "chosen for each text, as transformers does"),
        ("long", 2000, "Serve with a context above 4096 tokens"),
        ("short", 9000, "set `long_factor` to `short_factor`"),
    ],
)  # fmt: skip
def test_which_server_settings_mean_the_factors_that_were_trained(choice, longest, said, tmp_path):
    note = rope_note(LONG.with_rope_factors(choice), longest)
    assert said in note
    assert rope_note_beside(tmp_path) is None
    (tmp_path / "README.md").write_text(f"# LoRA adapter\n\n{note}\n\n## Results\n")
    assert rope_note_beside(tmp_path) == note  # what `phi3-jax export` prints


def test_without_longrope_there_is_nothing_to_say():
    assert rope_note(Phi3Config(), 2000) is None
    fixed = dataclasses.replace(LONG, max_position_embeddings=4096)
    assert rope_note(fixed, 2000) is None


def test_a_card_of_a_whole_run(checkpoint, chats, tmp_path):
    """License and language come from the base's card, and the hub's own parser reads this one."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# A model\n")
    assert terms_of(str(base)) == {"license": "mit", "language": ["en"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    config = make_config(base, "user/set", tmp_path, {"test_split": "test"}, run_name="pirate")
    train = {"longest": 2000, "examples": 1200, "tokens": 9000, "learned tokens": 4000}
    attempt = {"command": "phi3-jax train --config x", "versions": {"jax": "0.10"}}
    record = {"attempts": [attempt], "data": {"training": train}}
    results = {0: {"eval_loss": 3.0}, 1: {"eval_loss": 2e-5}}
    adapter = {"base_model_name_or_path": "microsoft/Phi-3-mini-128k-instruct", "r": 8}
    run = read_run(tmp_path, record)
    write_card(tmp_path / "adapter", config, adapter, 1, results, LONG, run)
    card = huggingface_hub.ModelCard.load(tmp_path / "adapter" / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("user/set", "test")
    assert (result.metric_type, result.metric_value) == ("loss", 2e-5)
    assert card.data.base_model == adapter["base_model_name_or_path"]
    assert (card.data.model_name, card.data.datasets) == ("pirate", ["user/set"])
    for said in ("1,200 examples with 9,000 tokens", "phi3-jax train --config x", "jax 0.10",
                 "| after 1 steps | 2.00e-05 |", "short factors only", "](loss.png)"):  # fmt: skip
        assert said in card.text
    assert (tmp_path / "adapter" / "loss.png").is_file()


def test_a_picture_that_cannot_be_drawn_is_left_out(
    checkpoint, chats, tmp_path, monkeypatch, capsys
):
    """As with a backend that matplotlib does not know."""

    def to_png(chart):
        raise ValueError("'foo' is not a valid value for backend")

    monkeypatch.setattr(card, "to_png", to_png)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    adapter = {"base_model_name_or_path": str(checkpoint), "r": 8}
    config = make_config(checkpoint, chats, tmp_path)
    write_card(tmp_path, config, adapter, 1, {}, LONG, read_run(tmp_path, {}))
    assert "loss.png" not in (tmp_path / "README.md").read_text()
    assert "no picture (ValueError: 'foo' is not a valid value" in capsys.readouterr().err


@pytest.mark.parametrize("evaluations", [{0: {"eval_loss": 3.0}, 6: {"eval_loss": 1.0}}, {}])
def test_the_card_of_a_step_that_was_not_evaluated(checkpoint, chats, tmp_path, evaluations):
    """What other steps were measured to have is not said of this one."""
    config = make_config(checkpoint, chats, tmp_path)
    adapter = {"base_model_name_or_path": str(checkpoint), "r": 8}
    write_card(tmp_path, config, adapter, 4, evaluations, LONG, read_run(tmp_path, {}))
    written = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert written.data.eval_results is None
    assert ("| after 0 steps | 3.0000 |" in written.text) == bool(evaluations)
    assert ("This adapter, of step 4, was not evaluated." in written.text) == bool(evaluations)
    assert "after 6 steps" not in written.text
