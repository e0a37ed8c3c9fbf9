"""Settings of other programs: suggestions, and the comparison with the installed libraries."""

from __future__ import annotations

import dataclasses
import inspect

import peft
import pytest
import transformers
import trl

from phi3_jax import UserError
from phi3_jax.config.compare import CLASSES, HEADER, NOTES, compare, same_name
from phi3_jax.config.foreign import MISSING, NOT_APPLICABLE, OTHER_NAMES
from phi3_jax.config.loader import load_config
from phi3_jax.config.run import SECTIONS
from phi3_jax.config.sections import QuantizationConfig
from tests.conftest import ROOT

MINIMAL = "model: {path: m}\ndata: {path: d}\ntraining: {output_dir: o}\n"
KEYS = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
KEYS |= {f"model.quantization.{key}" for key in QuantizationConfig.model_fields} | SECTIONS.keys()


def fields_of(kind) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_every_field_of_the_installed_classes_is_listed():
    arguments = fields_of(transformers.TrainingArguments)
    parameters = inspect.signature(transformers.BitsAndBytesConfig.__init__).parameters
    expected = {
        "TrainingArguments": arguments,
        "SFTConfig": [name for name in fields_of(trl.SFTConfig) if name not in arguments],
        "LoraConfig": fields_of(peft.LoraConfig),
        "BitsAndBytesConfig": [name for name in parameters if name not in ("self", "kwargs")],
    }
    for name, fields in expected.items():
        assert sorted(CLASSES[name].fields.split()) == sorted(fields), name


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "settings.md").read_text() == f"{HEADER}\n{compare()}\n"


def test_the_tables_are_true_of_the_keys():
    assert OTHER_NAMES.keys().isdisjoint(NOT_APPLICABLE) and set(OTHER_NAMES.values()) <= KEYS
    assert MISSING.keys().isdisjoint(OTHER_NAMES.keys() | NOT_APPLICABLE.keys())
    for name in MISSING.keys() | NOT_APPLICABLE.keys():
        assert not any(key.rpartition(".")[2] == name for key in KEYS), name
    named = {
        field for _, prefixes, fields in CLASSES.values()
        for field in fields.split() if same_name(field, prefixes)
    }  # fmt: skip
    assert NOTES.keys() <= named


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("peft.lora_r", "did you mean peft.r?"),
        ("peft.rank", "did you mean peft.r?"),
        ("training.lora_r", "did you mean peft.r?"),
        ("peft.learning_rate", "did you mean training.learning_rate?"),
        ("training.lr", "did you mean training.learning_rate?"),
        ("training.batch_size", "did you mean training.per_device_train_batch_size?"),
        ("training.num_epochs", "did you mean training.num_train_epochs?"),
        ("training.max_length", "did you mean data.max_length?"),
        ("training.max_seq_length", "did you mean data.max_length?"),
        ("model.load_in_4bit", "did you mean model.quantization.load_in_4bit?"),
        ("model.model_name_or_path", "did you mean model.path?"),
        ("data.sample_packing", "did you mean data.packing?"),
        ("training.evaluation_strategy", "did you mean training.eval_strategy?"),
        ("training.Micro-Batch-Size", "did you mean training.per_device_train_batch_size?"),
        ("training.deepspeed", "not a setting here: one program runs on all devices"),
        ("training.auto_find_batch_size", "not available here: `phi3-jax plan` says what fits"),
        ("training.learning_rat", "did you mean training.learning_rate?"),
    ],
)
def test_unknown_keys_are_understood(tmp_path, key, said):
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_config(file, [f"{key}=1"])
    assert str(caught.value).startswith(f"command line: {key}: unknown key; {said}")


def test_unknown_sections_and_keys_inside_one(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL + "lora_alpha: 3\nlora_r: 8\n")
    with pytest.raises(UserError) as caught:
        load_config(file, ["model.quantization={bits: 4, use_bnb_nested_quant: true}"])
    assert "lora_alpha: unknown key; did you mean peft.lora_alpha?" in str(caught.value)
    assert "lora_r: unknown key; did you mean peft.r?" in str(caught.value)
    assert (
        "unknown key use_bnb_nested_quant; did you mean "
        "model.quantization.bnb_4bit_use_double_quant?" in str(caught.value)
    )
