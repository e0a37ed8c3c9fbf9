"""What a recipe of another program says about its rows and layers is taken over, or named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from phi3_jax.config.convert import convert

AXOLOTL = """
base_model: m
adapter: lora
excess_length_strategy: truncate
chat_template: tokenizer_default
warmup_steps: 1
"""


def converted(tmp_path: Path, text: str) -> tuple[dict, list[str]]:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    found = convert(file)
    assert not found.problems, found.problems
    return yaml.safe_load(found.text), found.notes


@pytest.mark.parametrize(
    ("held_out", "data", "said"),
    [
        ("{path: a/b, split: eval}", {"test_split": "eval"}, []),
        ("{path: a/b}", {"test_split": "test"}, []),
        (
            "{path: a/b, split: eval, type: alpaca, field: t}",
            {"test_split": "eval"},
            [
                "format: 'alpaca' was not taken over: held-out rows are read with 'auto'",
                "columns: {'text': 't'} was not taken over: held-out rows are read with None",
            ],
        ),
        (
            "{path: a/b, split: eval, name: en}",
            {"test_path": "a/b"},
            [
                "name: 'en' was not taken over: held-out rows are read with None",
                "split: 'eval' was not taken over: held-out rows are read with 'train'",
            ],
        ),
        ("{path: c.jsonl, split: train}", {"test_path": "c.jsonl"}, []),
    ],
)
def test_the_held_out_rows_of_axolotl(tmp_path, held_out, data, said):
    text = f"""{AXOLOTL}
datasets: [{{path: a/b, split: chats, type: chat_template}}]
test_datasets: [{held_out}]
evals_per_epoch: 1
"""
    config, notes = converted(tmp_path, text)
    assert {key: value for key, value in config["data"].items() if "test" in key} == data
    assert config["training"]["eval_strategy"] == "epoch"
    assert [note.split(": ", 2)[2] for note in notes] == said


def test_the_held_out_rows_of_llama_factory(tmp_path):
    info = {
        "mine": {"hf_hub_url": "a/b", "num_samples": 30},
        "held": {"hf_hub_url": "a/b", "split": "eval", "num_samples": 300},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = (
        "model_name_or_path: m\nstage: sft\nlearning_rate: 1e-4\ndataset: mine\n"
        "eval_dataset: held\nmax_samples: 100\n"
    )
    config, notes = converted(tmp_path, text)
    assert config["data"]["test_split"] == "eval" and "test_path" not in config["data"]
    assert (config["data"]["max_samples"], config["data"]["max_test_samples"]) == (30, 100)
    assert notes == []


@pytest.mark.parametrize(
    ("listed", "targets"),
    [
        ("[q_proj, o_proj]", "all-linear"),
        (
            "[q_proj, embed_tokens]",
            ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens"],
        ),
    ],
)
def test_axolotl_adds_the_listed_layers_to_the_linear_ones(tmp_path, listed, targets):
    text = f"{AXOLOTL}\ndatasets: [{{path: d}}]\nlora_target_linear: true\n"
    config, notes = converted(tmp_path, f"{text}lora_target_modules: {listed}\n")
    assert config["peft"]["target_modules"] == targets and notes == []


def test_what_is_on_by_default_elsewhere_and_off_in_the_file_is_said(tmp_path):
    text = "base_model: m\nadapter: lora\ndatasets: [{path: d}]\n"
    _, notes = converted(tmp_path, text + "shuffle_merged_datasets: false\nstrict: false\n")
    said = "\n".join(notes)
    assert "shuffle_merged_datasets: False was not taken over" in said and "strict" not in said
    assert "excess_length_strategy: drop: longer rows are truncated here" in said
