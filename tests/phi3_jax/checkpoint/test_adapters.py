"""Adapters' folders: the settings beside an adapter, and what is given in place of one."""

from __future__ import annotations

import pytest

from lora_flax import BitsAndBytesConfig
from phi3_jax import UserError
from phi3_jax.checkpoint.adapters import (
    QUANTIZATION_FILE,
    read_quantization,
    require_adapter,
    write_quantization,
)
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.training.setup import continued_adapter
from tests.phi3_jax.conftest import make_config


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


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was stopped before it wrote its adapter."""
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "config.yaml").touch()
    return run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (".", "has not written its adapter yet; `phi3-jax export --run"),
        ("checkpoints", "the checkpoints of a run"),
        ("checkpoints/20", "--step 20 --format peft"),
        ("config.yaml", "is a file; give its folder"),
        ("checkpoints/20/none", "no such folder"),
    ],
)
def test_what_is_given_in_place_of_an_adapter(run, given, said):
    with pytest.raises(UserError, match=said):
        require_adapter(run / given)
    with pytest.raises(UserError, match=said):
        Checkpoint.open(run / given)
    config = make_config(run, run, run)
    peft = config.peft.model_copy(update={"adapter_name_or_path": str(run / given)})
    with pytest.raises(UserError, match=said):
        continued_adapter(config.model_copy(update={"peft": peft}))


def test_a_run_names_its_adapter(run):
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").touch()
    with pytest.raises(UserError, match="a run's folder; its adapter is .*run/adapter"):
        Checkpoint.open(run)


def test_a_sweep_names_its_members_adapters(run):
    member = run / "r=8"
    (member / "adapter").mkdir(parents=True)
    (member / "config.yaml").touch()
    with pytest.raises(UserError, match=r"a sweep's folder; .* written when it ends"):
        require_adapter(run)
    with pytest.raises(UserError, match="the checkpoints of a sweep, with all of its adapters; "):
        Checkpoint.open(run / "checkpoints")
    (member / "adapter" / "adapter_config.json").touch()
    for given in (run, run / "checkpoints" / "20"):
        with pytest.raises(UserError, match="in its members' folders, such as .*run/r=8/adapter"):
            require_adapter(given)
    with pytest.raises(UserError, match="r=8 is a run's folder; its adapter is .*r=8/adapter"):
        Checkpoint.open(member)
