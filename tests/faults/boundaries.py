"""Where the program takes input: one function each, given dice and a folder, that breaks it.

Every function returns what `outcome` says: the input worked, or was refused in a line.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from random import Random

import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lora_flax
import phi3_jax
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.config.convert import convert
from phi3_jax.config.loader import DataConfig, load_config
from phi3_jax.config.shipped import find_config
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.generation.answers import read_samples
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.network import Phi3
from phi3_jax.report.folder import read_runs
from phi3_jax.report.one import run_page
from phi3_jax.training.checkpoints import Checkpoints, saved_choices
from phi3_jax.training.metrics import open_metrics, read_evaluations
from phi3_jax.training.output import open_output
from phi3_jax.training.step import TrainState
from tests.faults.inputs import (
    ODD,
    ROWS,
    change_bytes,
    change_folder,
    change_text,
    change_value,
    data_file,
    flip_checkpoint,
    outcome,
    to_json,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
JINJA = [
    "{{ 1 / 0 }}", "{% for x in range(10**9) %}{{ x }}{% endfor %}", "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('no') }}", "{% include 'x' %}", "{{ messages[99] }}", "{{ x.y.z }}", "{%",
    "}}", "{{ 'a' * 10**7 }}", "{% set m = messages %}", "{{ messages | tojson }}", "\0", "\ud800",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ bos_token }}", "{# ", "{{ self }}",
]  # fmt: skip
YAML = [
    "!!python/object:os.system x", "&a", "*a", "<<: *a", "? ", "[" * 2000, "{", "010", "1:30",
    "2024-01-01", "!!binary aa", "9" * 5000, ": ", "- ", "---", "...", "\t", "%YAML 3.0\n", "|",
    ">", "no", "~", ".inf", "0x1F", "'", '"', "#", "\x85", "\u2028", "\0", "\x1b",
]  # fmt: skip
RECIPES = Path(__file__).parents[1] / "fixtures" / "recipes"
RUN = {
    "attempts": [
        {
            "command": "phi3-jax train", "started": "2026-01-01T00:00:00", "state": "finished",
            "step": 4, "seconds": {"steps": 3.0}, "memory": {"steps": {"host": 2**30}},
            "warnings": ["warning: x"], "versions": {"jax": "0.10.2"},
            "hardware": {"devices": 8, "device": "cpu", "platform": "cpu", "memory": 2**33},
        }
    ],
    "total_steps": 4,
    "model": {"name": "m", "folder": "/m", "parameters": 100, "trainable": 2},
    "data": {
        "training": {
            "rows": 5, "skipped": {"unreadable": 1}, "first skipped": {"unreadable": "a:2"},
            "columns read": ["a as b"], "columns not used": ["c"], "sources": {"a": [3, 4]},
            "histogram": [[0, 10, 3]],
        }
    },
}  # fmt: skip
VOCABULARY = 40
IDENTITY = {
    "base": "b", "data": "d", "held_out": "h", "chooses_best": False, "rows": [2, 4, 1],
    "asked": {"attn": "auto"}, "choices": {"attn": "splash"}, "planned": 4, "extend": None,
    "settings": {"training.seed": 1},
}  # fmt: skip


def state_of(value: float) -> TrainState:
    """Arrays that tell the step at which they were saved."""
    trainable = nnx.State({"lora_A": nnx.LoRAParam(jnp.full((2, 3), float(value)))})
    return TrainState(trainable, {"mu": jnp.full((2, 3), -float(value))})


class Sound:
    """Sound input to start from, made once, in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, 0
        self.config = yaml.safe_load(find_config("quickstart").read_text())
        self.base, self.adapter = folder / "base", folder / "adapter"
        small = {
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 64, "original_max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        self.model = Phi3(Phi3Config(**small), rngs=nnx.Rngs(0))
        phi3_jax.save(self.model, self.base, max_shard_size=4000)  # shards and their index
        words = {word: number for number, word in enumerate(["<unk>", *"abcdefgHiTea. <|>/:"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
            unk_token="<unk>", eos_token="e", chat_template=TEMPLATE,
        )  # fmt: skip
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.save_pretrained(self.base)
        self.tokenizer = load_tokenizer(self.base)
        wrapped = nnx.clone(self.model)
        lora = lora_flax.LoraConfig(r=2, target_modules="all-linear")
        lora_flax.wrap(wrapped, lora, rngs=nnx.Rngs(1))
        lora_flax.save_peft(wrapped, self.adapter, base_model_name_or_path="base")
        self.run = folder / "run"
        with Checkpoints(self.run / "checkpoints", IDENTITY, None) as checkpoints:
            for step in (2, 4):
                checkpoints.save(step, state_of(step), {})
        self.metrics = "".join(
            json.dumps({"step": step, "loss": 1.5, "eval_loss": 2.5}) + "\n" for step in range(1, 5)
        )

    def new(self) -> Path:
        """A path that does not exist yet."""
        self.made += 1
        return self.folder / str(self.made)


def config(dice: Random, sound: Sound) -> str:
    """A YAML file, and overrides on the command line."""
    if dice.randrange(3):
        text = to_json(change_value(dice, sound.config))  # which is YAML, too
    else:
        text = change_text(dice, yaml.safe_dump(sound.config), YAML)
    file = sound.new()
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    keys = ["training.seed", "peft.r", "data", "mesh.data", "x.y", "model.", ".", "a.b.c", ""]
    overrides = [
        f"{dice.choice(keys)}={change_text(dice, str(dice.choice(ODD)), YAML)}"
        for _ in range(dice.randrange(3))
    ]
    return outcome(lambda: load_config(file, overrides))


def rows(dice: Random, sound: Sound) -> str:
    """A file of rows in any format, read, tokenized, and packed."""
    file = data_file(dice, sound.new())
    settings = {"path": str(file), "cache_dir": str(sound.new()), "packing": not dice.randrange(3)}
    if not dice.randrange(4):
        settings["test_size"] = dice.choice([1, 0.5])
    if not dice.randrange(4):
        settings["on_bad_row"] = "skip"
    section = DataConfig.model_validate(settings | {"max_length": 64})
    return outcome(lambda: load_examples(section, sound.tokenizer))


def model(dice: Random, sound: Sound) -> str:
    """A model folder: config.json, shards, their index."""
    folder = change_folder(dice, sound.base, sound.new())

    def read() -> None:
        opened = Checkpoint.open(folder)
        _ = opened.fingerprint
        opened.bytes("float32")
        if opened.config == sound.model.config:  # any other shape would be compiled
            opened.load()
        else:
            opened.parts("float32")

    return outcome(read)


def adapter(dice: Random, sound: Sound) -> str:
    """A PEFT adapter: adapter_config.json and safetensors."""
    folder = change_folder(dice, sound.adapter, sound.new())
    holder = nnx.clone(sound.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fields that PEFT does not have
        return outcome(lambda: lora_flax.load_peft(holder, folder))


def tokenizer(dice: Random, sound: Sound) -> str:
    """A tokenizer's files and its chat template, and a chat that is encoded with them."""
    folder = sound.new()
    shutil.copytree(sound.base, folder)
    file = folder / dice.choice(
        ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.jinja"]
    )
    if file.suffix == ".jinja":
        text = change_text(dice, TEMPLATE, JINJA)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif dice.randrange(3):
        changed = change_value(dice, json.loads(file.read_bytes()))
        file.write_bytes(to_json(changed).encode("utf-8", "surrogatepass"))
    else:
        file.write_bytes(change_bytes(dice, file.read_bytes()))
    data = sound.new()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    section = {"path": str(data.rename(data.with_suffix(".jsonl"))), "cache_dir": str(sound.new())}

    def read() -> None:
        load_examples(DataConfig.model_validate(section), load_tokenizer(folder))

    return outcome(read)


def checkpoint(dice: Random, sound: Sound) -> str:
    """A run's last checkpoint: never other numbers, and with `auto` always a start."""
    folder = sound.new()
    shutil.copytree(sound.run / "checkpoints", folder)
    flip_checkpoint(dice, folder / "4")
    if not dice.randrange(3) and (folder / "4" / "state").is_dir():
        flip_checkpoint(dice, folder / "4" / "state")
    saved_choices(folder)
    checkpoints = Checkpoints(folder, IDENTITY, None)
    refused = outcome(lambda: check(checkpoints.start(state_of(0), True, False)))
    assert outcome(lambda: check(checkpoints.start(state_of(0), True, True))) == "worked"
    return refused


def check(found: tuple[int, TrainState]) -> None:
    """Fail unless the arrays are those of the step."""
    step, state = found
    np.testing.assert_array_equal(state.trainable["lora_A"][...], np.full((2, 3), step))
    np.testing.assert_array_equal(state.opt_state["mu"], np.full((2, 3), -step))


def records(dice: Random, sound: Sound) -> str:
    """What else a resumed run finds in its folder: metrics.jsonl, samples.jsonl, its lock."""
    folder = sound.new()
    folder.mkdir()
    lines = sound.metrics.splitlines()
    if dice.randrange(2):
        at = dice.randrange(len(lines))
        lines[at] = to_json(change_value(dice, json.loads(lines[at])))
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folder / "metrics.jsonl").write_bytes(change_bytes(dice, data) if dice.randrange(2) else data)
    sample = to_json(change_value(dice, {"prompt": "a", "before": "b"}))
    (folder / "samples.jsonl").write_bytes(sample.encode("utf-8", "surrogatepass"))
    lock = {"host": "h", "pid": 1, "started": 1.0, "id": "x", "expires": 1.0}
    lock = to_json(change_value(dice, lock))
    (folder / ".lock").write_bytes(lock.encode("utf-8", "surrogatepass"))
    settings = load_config("quickstart", ["training.report_to=[none]"])

    def read() -> None:
        with open_output(str(folder), "auto"), open_metrics(settings, folder, 4):
            for values in read_evaluations(folder).values():
                assert all(isinstance(value, float) for value in values.values())
            for one in read_samples(folder / "samples.jsonl"):
                assert isinstance(one["prompt"], str)

    return outcome(read)


def recipe(dice: Random, sound: Sound) -> str:
    """A config of TRL, LLaMA-Factory or Axolotl, with what it points at."""
    folder = sound.new()
    shutil.copytree(RECIPES, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in dice.sample(files, dice.randint(1, 3)):
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
        text = to_json(change_value(dice, value)) if dice.randrange(3) else file.read_text()
        text = text if dice.randrange(3) else change_text(dice, text, YAML)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    file = dice.choice([file for file in files if file.suffix == ".yaml"])
    return outcome(lambda: convert(file))


def report(dice: Random, sound: Sound) -> str:
    """What a report is made of: run.json and all else in a run's folder."""
    folder = sound.new()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(sound.metrics)
    files = {
        "run.json": RUN,
        "samples.jsonl": {"prompt": "a", "before": "b", "after": "c"},
        "evaluation.json": {"base": {"loss": 1.5}, "questions": 3},
        "config.yaml": sound.config,
        "sweep.json": {"members": [{"name": "a"}]},
    }
    for name, value in files.items():
        text = to_json(change_value(dice, value)) if dice.randrange(2) else to_json(value)
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    changed = folder / dice.choice(["metrics.jsonl", *files])
    if dice.randrange(2):
        changed.write_bytes(change_bytes(dice, changed.read_bytes()))
    return outcome(lambda: run_page(read_runs([folder])[0]))


BOUNDARIES = [config, rows, model, adapter, tokenizer, checkpoint, records, recipe, report]
