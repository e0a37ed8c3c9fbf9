"""Each of the guide's samples runs, on a tiny model and a few local rows of its own format."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import phi3_jax
from phi3_jax.checkpoint.adapters import load_with_adapter
from phi3_jax.cli import main as cli
from phi3_jax.config.loader import RunConfig, load_config
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.generation.prompts import encode_chat
from phi3_jax.training.loop import train
from tests.conftest import CONFIGS, forward
from tests.phi3_jax.export.llama_cpp import LlamaCpp

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def messages(word: str) -> dict:
    return {"messages": [
        {"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word},
    ]}  # fmt: skip


def sharegpt(word: str) -> dict:
    return {"conversations": [
        {"from": "system", "value": "Be short."}, {"from": "human", "value": f"Say {word}."},
        {"from": "gpt", "value": word},
    ]}  # fmt: skip


def alpaca(word: str) -> dict:
    return {"instruction": "Say the word.", "input": word, "output": word, "prompt": "unused"}


ROWS = {
    "guide_sample_finetune": messages,
    "guide_lora_notebook": alpaca,
    "guide_qlora_notebook": alpaca,
    "guide_training_script": sharegpt,
    "guide_inference_notebook": sharegpt,
}


def test_every_guide_config_is_here():
    assert {file.stem for file in CONFIGS.glob("guide_*.yaml")} == ROWS.keys()


def guide_config(checkpoint, folder, name: str, *overrides: str) -> RunConfig:
    """The shipped config, for two steps on a tiny model and local rows."""
    data = folder / "data"
    data.mkdir()
    splits = ("train_sft", "test_sft") if "sample_finetune" in name else ("train",)
    for split in splits:
        words = [word if split.startswith("train") else f"{word} times" for word in WORDS * 2]
        lines = [json.dumps(ROWS[name](word)) + "\n" for word in words]
        (data / f"{split}.jsonl").write_text("".join(lines))
    return load_config(
        CONFIGS / f"{name}.yaml",
        [
            f"model.path={checkpoint}",
            f"data.path={data}",
            f"training.output_dir={folder / 'out'}",
            "training.max_steps=2",
            "training.report_to=none",
            "training.sample_max_new_tokens=4",
            "mesh.data=1",  # not all of the eight devices
            *overrides,
        ],
    )


@pytest.mark.parametrize("name", ROWS)
def test_runs(checkpoint, tmp_path, name):
    config = guide_config(checkpoint, tmp_path, name)
    result = train(config)
    assert (result.adapter / "adapter_model.safetensors").exists()
    assert result.steps == 2 and result.skipped == 0
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    # Every program's formula gives the scale that was trained.
    lora = config.peft.to_lora()
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert written["lora_alpha"] / written["r"] == pytest.approx(lora.scaling)
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    rows = {value.shape[0] for key, value in tensors.items() if "lora_A" in key}
    assert rows == {written["r"]} and written["use_rslora"] is False
    assert "merge first" not in (result.adapter / "README.md").read_text().split("- MLX")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guide_lora_notebook", "guide_qlora_notebook"])
def test_a_notebook_ends_in_llama_cpp(checkpoint, tmp_path, name):
    """Trained, exported in one command, and answered by llama.cpp as by this program."""
    # Large enough a rate that two steps change the answer.
    fast = ("training.learning_rate=0.05", "training.warmup_ratio=0", "training.save_steps=2")
    config = guide_config(checkpoint, tmp_path, name, *fast)
    result = train(config)
    base = phi3_jax.Checkpoint.open(checkpoint)
    model = load_with_adapter(base, result.adapter, "float32")
    messages = [{"role": "user", "content": "Say the word.\n Input: seven"}]
    ids = encode_chat(messages, load_tokenizer(checkpoint))
    (new,) = phi3_jax.generate(model, [ids], 6)
    assert phi3_jax.generate(base.load("float32"), [ids], 6) != [new]
    logits = forward(model, np.array([ids], np.int32))[0, -1]
    expected = np.asarray(jax.nn.log_softmax(logits))

    def assert_answers(file, adapter=None) -> None:
        theirs = LlamaCpp(file, adapter)
        rendered = theirs.post("/apply-template", {"messages": messages})["prompt"]
        assert theirs.tokenize(rendered, add_special=True) == ids
        steps = theirs.greedy(ids, 6)
        assert [max(step, key=step.__getitem__) for step in steps] == new[: len(steps)]
        assert max(abs(value - expected[token]) for token, value in steps[0].items()) < 1e-3

    def export(*arguments: object) -> None:
        assert cli.main(["export", *map(str, arguments)]) == 0

    merged, small, lora = (tmp_path / f"{kind}.gguf" for kind in ("merged", "base", "lora"))
    run = config.training.output_dir
    export("--run", run, "--format", "gguf", "--dtype", "float32", "--output", merged)
    assert_answers(merged)
    if config.model.quantization is None:  # else the adapter belongs to the base as it was rounded
        export("--model", checkpoint, "--format", "gguf", "--dtype", "float32", "--output", small)
        export("--run", run, "--format", "gguf-adapter", "--output", lora)
        assert_answers(small, lora)
