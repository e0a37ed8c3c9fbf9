"""The quantization settings saved beside an adapter."""

from __future__ import annotations

import pytest

from lora_flax import BitsAndBytesConfig
from phi3_jax import UserError
from phi3_jax.checkpoint.adapters import (
    QUANTIZATION_FILE,
    read_quantization,
    write_quantization,
)


def test_settings_come_back(tmp_path):
    assert read_quantization(tmp_path) is None
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=("lm_head", "o_proj"),
    )
    write_quantization(settings, tmp_path)
    assert read_quantization(tmp_path) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not valid JSON"), ("[]", "expected a JSON object"), ("{}", "one of load_in_4bit")],
)
def test_bad_settings_name_the_file(tmp_path, text, said):
    (tmp_path / QUANTIZATION_FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{QUANTIZATION_FILE}.*{said}"):
        read_quantization(tmp_path)
