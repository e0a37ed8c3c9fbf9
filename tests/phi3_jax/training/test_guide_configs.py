"""Each of the guide's samples runs, on a tiny model and a few local rows of its own format."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file

from phi3_jax.config.loader import load_config
from phi3_jax.training.loop import train
from tests.conftest import CONFIGS

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


@pytest.mark.parametrize("name", ROWS)
def test_runs(checkpoint, tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    splits = ("train_sft", "test_sft") if "sample_finetune" in name else ("train",)
    for split in splits:
        lines = [json.dumps(ROWS[name](word)) + "\n" for word in WORDS * 2]
        (data / f"{split}.jsonl").write_text("".join(lines))
    config = load_config(
        CONFIGS / f"{name}.yaml",
        [
            f"model.path={checkpoint}",
            f"data.path={data}",
            f"training.output_dir={tmp_path / 'out'}",
            "training.max_steps=2",
            "training.report_to=none",
            "training.sample_max_new_tokens=4",
            "mesh.data=1",  # not all of the eight devices
        ],
    )
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
