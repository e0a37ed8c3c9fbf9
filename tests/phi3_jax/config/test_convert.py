"""Recipes of TRL, LLaMA-Factory, and Axolotl become configs of this program that mean the same."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from phi3_jax import UserError
from phi3_jax.cli import main as cli
from phi3_jax.config.convert import convert
from phi3_jax.config.loader import load_config
from phi3_jax.training.loop import train
from tests.conftest import ROOT

RECIPES = ROOT / "tests" / "fixtures" / "recipes"


def converted(path) -> tuple[dict, list[str]]:
    found = convert(path)
    assert not found.problems, found.problems
    return yaml.safe_load(found.text), found.notes


def written(tmp_path, text: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_trl():
    config, notes = converted(RECIPES / "trl.yaml")
    assert config == {
        "model": {
            "path": "microsoft/Phi-3-mini-4k-instruct",
            "dtype": "bfloat16",
            "quantization": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
        },
        "peft": {"r": 32, "lora_alpha": 16, "target_modules": ["qkv_proj", "o_proj"]},
        "data": {
            "path": "trl-lib/Capybara",
            "test_split": "test",
            "assistant_only_loss": True,
            "max_length": 2048,
            "packing": True,
        },
        "training": {
            "output_dir": "Phi-3-mini-SFT",
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "warmup_ratio": 0.03,
            "loss_type": "dft",
            "neftune_noise_alpha": 5,
            "gradient_checkpointing": True,
            "logging_steps": 25,
            "eval_strategy": "steps",
            "eval_steps": 100,
            "lr_scheduler_type": "cosine",
            "report_to": ["trackio", "wandb"],
            "optim": "paged_adamw_8bit",
            "learning_rate": 2e-4,
            "save_steps": 500,
        },
    }
    assert notes == [
        "attn_implementation: flash_attention_2 was not taken over: auto picks a kernel of JAX",
        "push_to_hub: true was not taken over: it needs training.hub_model_id",
        "gradient_checkpointing_kwargs: not taken over: they are torch's",
        "eos_token: '<|end|>' was not taken over: it comes from the tokenizer and the chat "
        "template",
        "dataloader_num_workers: 4 was not taken over: the next batch is built while a step runs",
    ]


def test_llama_factory():
    config, notes = converted(RECIPES / "llama_factory.yaml")
    alpaca = str(RECIPES / "data" / "alpaca_en_demo.json")
    assert config == {
        "model": {"path": "microsoft/Phi-3-mini-4k-instruct", "dtype": "bfloat16"},
        "peft": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {
            "sources": [
                {
                    "path": str(RECIPES / "data" / "identity.json"),
                    "format": "alpaca",
                    "weight": 1.0,
                    "max_samples": 1000,
                },
                {
                    "max_samples": 1000,
                    "path": alpaca,
                    "format": "alpaca",
                    "columns": {
                        "instruction": "instruction",
                        "input": "input",
                        "output": "output",
                    },
                    "weight": 1.0,
                },
            ],
            "test_size": 0.1,
            "max_length": 2048,
            "dataset_num_proc": 16,
        },
        "training": {
            "output_dir": "saves/phi3-mini/lora/sft",
            "num_train_epochs": 3.0,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "warmup_ratio": 0.1,
            "logging_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": 500,
            "save_steps": 500,
            "lr_scheduler_type": "cosine",
            "report_to": ["none"],
            "learning_rate": 1e-4,
        },
    }
    said = "\n".join(notes)
    for part in ("template: phi was not", "dataset: data.sources mixes", "plot_loss: True was not"):
        assert part in said
    assert "resume_from" not in said and "save_only_model" not in said


def test_axolotl():
    config, notes = converted(RECIPES / "axolotl.yaml")
    assert config == {
        "model": {
            "path": "microsoft/Phi-3.5-mini-instruct",
            "quantization": {"load_in_8bit": True},
            "dtype": "bfloat16",
        },
        "peft": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "data": {
            "path": "fozziethebeat/alpaca_messages_2k_test",
            "format": "auto",
            "columns": {"messages": "messages"},
            "test_size": 0.05,
            "max_length": 4096,
            "packing": False,
            "assistant_only_loss": True,
        },
        "training": {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_train_epochs": 2.0,
            "output_dir": "./outputs/lora-out",
            "gradient_accumulation_steps": 4,
            "warmup_ratio": 0.2,
            "weight_decay": 0.0,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "eval_steps": 0.125,
            "save_steps": 0.125,
            "lr_scheduler_type": "cosine",
            "optim": "adamw_bnb_8bit",
            "learning_rate": 2e-4,
        },
    }
    said = "\n".join(notes)
    for part in (
        "chat_template: phi_3 was",
        "flash_attention: true was",
        "deepspeed: 'deepspeed_c",
    ):
        assert part in said
    assert "wandb" not in said and "roles" not in said


def test_a_converted_recipe_trains(checkpoint, chats, tmp_path, capsys):
    text = f"""
        base_model: {checkpoint}
        datasets: [{{path: {chats}, type: chat_template}}]
        val_set_size: 2
        adapter: lora
        lora_r: 4
        lora_alpha: 8
        lora_target_linear: true
        sequence_len: 128
        excess_length_strategy: truncate
        micro_batch_size: 2
        num_epochs: 1
        max_steps: 2
        optimizer: muon
        learning_rate: 0.01
        warmup_steps: 0
        lr_scheduler: constant
        evals_per_epoch: 1
        output_dir: {tmp_path / "run"}
    """
    file = written(tmp_path, text)
    assert cli.main(["convert-config", str(file)]) == 0
    captured = capsys.readouterr()
    ours = tmp_path / "ours.yaml"
    ours.write_text(captured.out)
    overrides = ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "training.report_to=none"]
    config = load_config(ours, overrides)
    assert captured.err == "" and config.training.optimizer == "muon"
    result = train(config)
    assert result.steps == 2
    assert result.evaluations[2]["eval_loss"] < result.evaluations[0]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl", "llama_factory", "axolotl"])
def test_a_programs_own_recipe_runs(name, checkpoint, chats, tmp_path, capsys):
    """As converted, but for the model and the data, which are downloads, and the size of a step."""
    recipes = shutil.copytree(RECIPES, tmp_path / "recipes")
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": "One."} for n in range(4)]
    for file in ("identity", "alpaca_en_demo"):  # LLaMA-Factory's are beside its recipe
        (recipes / "data" / f"{file}.json").write_text(json.dumps(rows))
    assert cli.main(["convert-config", str(recipes / f"{name}.yaml")]) == 0
    ours = tmp_path / "ours.yaml"
    ours.write_text(capsys.readouterr().out)
    data = [f"data.path={chats}", "data.test_split=null"] if name != "llama_factory" else []
    smaller = {
        "model.path": checkpoint, "data.max_length": 64, "data.test_size": 2,
        "data.dataset_num_proc": 1, "training.max_steps": 1, "training.eval_steps": 1,
        "training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 1,
        "training.report_to": "none", "training.output_dir": tmp_path / "run", "mesh.data": 1,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in smaller.items()]
    assert cli.main(["train", "--config", str(ours), *overrides, *data]) == 0
    fields = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == load_config(ours).peft.r
    assert "step 1/1  held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: m\nadapter:\n", "adapter: None: only LoRA runs can be converted"),
        ("base_model: m\nadapter: lora\nrl: dpo\n", "rl: only LoRA runs can be converted"),
        ("model_name_or_path: m\ndataset_name: d\n", "use_peft is not true: only LoRA runs"),
        ("model_name_or_path: m\nstage: dpo\n", "stage: dpo: only LoRA runs"),
        ("model_name_or_path: m\nstage: sft\nfinetuning_type: full\n", "finetuning_type: full:"),
        ("model: {path: m}\n", "is a config of this program already"),
        ("a: 1\n", "not a config of TRL, LLaMA-Factory or Axolotl, which have"),
        ("- a\n", "expected a mapping of settings"),
        ("a: [\n", "not valid YAML"),
        ("base_model: m\nadapter: lora\ndatasets: [3]\n", "a value is not what Axolotl takes"),
        ("base_model: m\nadapter: lora\ndatasets: [{type: alpaca}]\n", "a data set has no path"),
    ],
)
def test_what_cannot_be_converted(tmp_path, text, said):
    with pytest.raises(UserError) as caught:
        convert(written(tmp_path, text))
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ("[" * 5000, "not valid JSON (nested too deeply)"),
        ("[]", "expected a JSON object, not a list"),
        ('{"mine": [1]}', "mine: expected an object, not a list"),
    ],
)
def test_a_damaged_dataset_info(tmp_path, info, said):
    text = "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: mine\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(info)
    with pytest.raises(UserError) as caught:
        convert(written(tmp_path, text))
    assert said in str(caught.value) and "dataset_info.json" in str(caught.value)


def test_what_is_missing_or_has_no_equal_is_said(tmp_path, capsys):
    text = """
        model_name_or_path: m
        use_peft: true
        optim: galore_adamw
        lr_scheduler_type: reduce_lr_on_plateau
        fp16: true
        frobnicate: 3
        mesh_shape: null
    """
    assert cli.main(["convert-config", str(written(tmp_path, text))]) == 2
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out)["training"]["num_train_epochs"] == 3.0
    for part in (
        "optim: galore_adamw cannot be used",
        "lr_scheduler_type: 'reduce_lr_on_plateau' was not taken over: the config has linear",
        "fp16: true was not taken over",
        "frobnicate: 3 was not taken over: unknown here",
        "lora_target_modules: PEFT has no default for Phi-3",
        "to correct: data.path: missing",
    ):
        assert part in captured.err
    assert "mesh_shape" not in captured.err


@pytest.mark.parametrize(
    ("program", "setting", "key", "value"),
    [
        ("axolotl", "load_in_4bit: true", "model.quantization", {"load_in_4bit": True}),
        ("axolotl", "train_on_inputs: true", "data.assistant_only_loss", False),
        ("axolotl", "saves_per_epoch: 1", "training.save_strategy", "epoch"),
        ("axolotl", "cosine_min_lr_ratio: 0.1", "training.lr_scheduler_type", "cosine_with_min_lr"),
        ("axolotl", "val_set_size: 100", "data.test_size", 100),
        ("axolotl", "streaming: true\nmax_steps: 5", "data.streaming", True),
        ("axolotl", "wandb_project: x", "training.report_to", ["wandb"]),
        ("axolotl", "hub_model_id: a/b", "training.push_to_hub", True),
        ("axolotl", "optimizer: lion_pytorch", "training.optim", "lion_32bit"),
        ("axolotl", "early_stopping_patience: 3", "training.early_stopping_patience", 3),
        ("llama", "lora_target: q_proj,v_proj", "peft.target_modules", ["q_proj", "v_proj"]),
        ("llama", "lora_target: o_proj", "peft.target_modules", ["o_proj"]),
        ("llama", "pissa_init: true", "peft.init_lora_weights", "pissa_niter_16"),
        ("llama", "quantization_bit: 8", "model.quantization", {"load_in_8bit": True}),
        ("llama", "mask_history: true", "data.train_on", "last"),
        ("llama", "neat_packing: true", "data.packing", True),
        ("llama", "val_size: 0.1\npredict_with_generate: true", "training.eval_generate", True),
        ("llama", "streaming: true\nmax_steps: 5", "data.shuffle_buffer_size", 16384),
        ("llama", "optim: adafactor", "training.optim", "adafactor"),
        ("llama", "lora_alpha: 5", "peft.lora_alpha", 5),
        ("trl", "save_strategy: epoch", "training.save_strategy", "epoch"),
        ("trl", "lr_scheduler_type: constant\nwarmup_ratio: 0.1", "training.warmup_ratio", None),
        ("trl", "group_by_length: true", "training.train_sampling_strategy", "group_by_length"),
        ("trl", "activation_offloading: true", "training.remat_policy", "offload"),
        ("trl", "packing_strategy: bfd-requeue", "data.packing_strategy", "bfd_split"),
        ("trl", "max_steps: 10", "training.num_train_epochs", None),
        ("trl", "dataset_streaming: true\nmax_steps: 5", "data.streaming", True),
        ("trl", "model_revision: abc", "model.revision", "abc"),
    ],
)
def test_settings_one_by_one(tmp_path, program, setting, key, value):
    least = {
        "axolotl": "base_model: m\nadapter: lora\ndatasets: [{path: d}]\n",
        "llama": "model_name_or_path: m\nstage: sft\ndataset: d\nlearning_rate: 1e-4\n",
        "trl": "model_name_or_path: m\nuse_peft: true\ndataset_name: d\n",
    }
    extra = "val_set_size: 0.1\nevals_per_epoch: 2\n" if "stopping" in setting else ""
    found = convert(written(tmp_path, least[program] + extra + setting + "\n"))
    section, _, name = key.partition(".")
    got = yaml.safe_load(found.text)[section].get(name)
    if isinstance(value, dict):
        got = {name: got[name] for name in value}
    assert got == value
    assert found.problems == []
