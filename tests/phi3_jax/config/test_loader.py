"""The run config: what is read, what is refused and what the message says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lora_flax
from phi3_jax.config.loader import load_config
from phi3_jax.config.run import SECTIONS
from phi3_jax.errors import UserError
from phi3_jax.training.optimizer import total_steps
from tests.conftest import CONFIGS

MINIMAL = """
model: {path: m}
data: {path: d}
training: {output_dir: o}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return str(error.value).replace(f"{path}: ", "").splitlines()


def test_defaults(write):
    config = load_config(write(MINIMAL))
    assert (config.model.dtype, config.peft.r, config.data.max_length) == ("auto", 16, 1024)
    assert config.training.learning_rate == 2e-4
    assert config.training.report_to == ["tensorboard"]


@pytest.mark.parametrize("file", sorted((CONFIGS).glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_load_and_come_back(file, write):
    config = load_config(file)
    assert load_config(write(config.to_yaml())) == config


def test_the_guide_s_recipe():
    config = load_config(CONFIGS / "guide_sample_finetune.yaml")
    training = config.training
    assert (training.learning_rate, training.lr_scheduler_type) == (5e-6, "cosine")
    assert (training.warmup_ratio, training.save_steps, training.save_total_limit) == (0.2, 100, 1)
    assert (training.per_device_train_batch_size, training.seed) == (4, 0)
    assert (config.data.split, config.data.test_split) == ("train_sft", "test_sft")
    assert config.peft.to_lora() == lora_flax.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"
    )


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("5e-6", 5e-6), ("5.0e-06", 5e-6), ("1.5e0", 1.5), ("1", 1.0)]
)
def test_exponents_are_numbers_in_files_and_overrides(write, text, value):
    in_file = write(MINIMAL.replace("output_dir: o", f"output_dir: o, learning_rate: {text}"))
    assert load_config(in_file).training.learning_rate == value
    plain = write(MINIMAL)
    assert load_config(plain, [f"training.learning_rate={text}"]).training.learning_rate == value


def test_overrides_are_yaml(write):
    config = load_config(
        write(MINIMAL),
        [
            "model.path=/some/where=else",
            "peft.target_modules=[qkv_proj, o_proj]",
            "training.report_to=none",
            "data.test_size=0.05",
            "training.run_name=null",
        ],
    )
    assert config.model.path == "/some/where=else"
    assert config.peft.target_modules == ["qkv_proj", "o_proj"]
    assert config.training.report_to == ["none"]
    assert config.data.test_size == 0.05
    assert config.training.run_name is None


def test_all_problems_at_once_each_with_its_key(write):
    path = write("""
model: {path: m, dtype: float8}
peft:
data: {path: d, max_lenght: 5, test_size: a}
training: {output_dir: o, lerning_rate: 1e-4, max_steps: "5", learning_rate: .inf, r: 4}
trainign: {}
""")
    assert problems(path, "training.sed=1", "nonsense", "peft.r=0") == [
        "command line: 'nonsense' is not of the form section.key=value",
        "model.dtype: 'float8' should be 'auto', 'float32', 'bfloat16' or 'float16'",
        "command line: peft.r: 0 should be greater than or equal to 1",
        "data.test_size: 'a' should be a valid number or a valid integer",
        "data.max_lenght: unknown key; did you mean data.max_length?",
        "training.max_steps: '5' should be a valid integer",
        "training.learning_rate: inf should be a finite number",
        "training.lerning_rate: unknown key; did you mean training.learning_rate?",
        "training.r: unknown key; did you mean peft.r?",
        "command line: training.sed: unknown key; did you mean training.seed?",
        "and 1 more",
    ]
    assert problems(write(MINIMAL + "trainign: {}")) == [
        "trainign: unknown key; did you mean training?"
    ]


def test_paths_are_not_empty_and_steps_fit_an_int32(write):
    """`data.path: ""` would be the current folder."""
    keys = ["data.path", "data.test_path", "data.cache_dir", "model.path", "training.output_dir"]
    keys += ["data.chat_template_path", "peft.adapter_name_or_path"]
    for key in keys:
        assert problems(write(MINIMAL), f"{key}=''") == [
            f"command line: {key}: '' should have at least 1 character"
        ]
        for path, wrong in (
            ("~nobody-here/x", "has no home directory"),
            ("a\\0", "null character"),
        ):
            (said,) = problems(write(MINIMAL), f'{key}="{path}"')
            assert said.startswith(f"command line: {key}: ") and wrong in said
    for key in ("extend", "warmup_steps"):
        (said,) = problems(write(MINIMAL), f"training.{key}=1000000000000")
        assert "should be less than 2147483648" in said
    config = load_config(write(MINIMAL), ["training.num_train_epochs=2e9"])
    with pytest.raises(UserError, match="4,000,000,000 steps are more than 2,147,483,647; lower"):
        total_steps(config.training, 2)


def test_the_message_names_the_file(write):
    path = write(MINIMAL + "peft: {alpha: 3}\n")
    with pytest.raises(UserError, match=f"^{path}: peft.alpha: unknown key; did you mean peft.l"):
        load_config(path)


def test_missing_sections_and_keys(write):
    lines = problems(write("model:\n"))
    assert [line.split(";")[0] for line in lines] == [
        "model.path: missing",
        "data.path: missing",
        "training.output_dir: missing",
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "expected the sections model, peft, data, training, sweep, mesh, not None"),
        ("- 1\n", "expected the sections model, peft, data, training, sweep, mesh, not [1]"),
        ("a: [\n", "not valid YAML"),
        ("model: {path: a, path: b}\n", "duplicate key 'path'"),
        ("? [1]\n: 2\n", "unhashable key"),
        ("a: 2024-13-01\n", "a: unknown key"),
        ("training: {seed: 010x}", "training.seed: '010x' should be a valid integer"),
        ("peft: {use_dora: yes}", "peft.use_dora: 'yes' should be a valid boolean"),
        ("training: {run_name: 2024-01-01, output_dir: 1}", "training.output_dir: 1 should be"),
        ("1: 2\n", "1: unknown key"),
        ("training: {1: 2}", "training.1: unknown key"),
        ("training: &a {sample_prompts: [*a]}", "training.sample_prompts: {"),
        ("[" * 5000, "not valid YAML: nested too deeply"),
        ("training: {seed: " + "9" * 5000 + "}", "not valid YAML: line 1, column 18: an integer"),
        ("training: {max_steps: 10000000000}", "max_steps: 10000000000 should be less than"),
        ("model: 3\n", "model: 3 should be a mapping of keys to values"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_not_a_config(write, text, said):
    assert any(said in line for line in problems(write(text)))


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="nope.yaml: no such config file"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.test_size=0.1", "data.test_split=test"], "not test_split and test_size"),
        (["data.test_size=1.5"], "data.test_size: 1.5 must be a fraction below 1"),
        (["training.warmup_ratio=0.1", "training.warmup_steps=5"], "0.1 and warmup_steps 5 are"),
        (["training.per_device_train_batch_size=1000000000"], "are more than 268,435,456 tokens"),
        (["training.num_train_epochs=1e10"], "training.num_train_epochs: more than"),
        (["training.max_steps=0"], "training.max_steps: 0 steps train nothing"),
        (["training.eval_steps=5"], "training.eval_steps: 5 needs held-out rows"),
        (["training.load_best_model_at_end=true"], "load_best_model_at_end: True needs held-out"),
        (
            ["data.test_size=9", "training.load_best_model_at_end=true", "training.eval_steps=5"],
            "needs evaluations and checkpoints, but save_strategy is no: set",
        ),
        (
            [
                "data.test_size=9",
                "training.load_best_model_at_end=true",
                "training.eval_steps=5",
                "training.save_steps=7",
            ],
            "training.save_steps: 7 must be a multiple of eval_steps 5",
        ),
        (["training.report_to=[none, wandb]"], "none cannot be combined"),
        (["peft.target_modules=[]"], "peft: target_modules must be"),
    ],
)
def test_keys_that_contradict_each_other(write, overrides, said):
    lines = problems(write(MINIMAL), *overrides)
    assert any(said in line for line in lines), lines


def test_to_yaml_is_plain_yaml(write):
    raw = yaml.safe_load(load_config(write(MINIMAL)).to_yaml())
    assert list(raw) == list(SECTIONS)
    assert raw["training"]["report_to"] == ["tensorboard"]
