"""A tiny Phi-3 with the real Phi-3 tokenizer, a chat file, and a config that trains on them."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path

import fsspec
import pytest
import yaml

from phi3_jax.checkpoint import index
from phi3_jax.config.loader import RunConfig
from phi3_jax.model.network import Phi3
from phi3_jax.report import charts
from phi3_jax.training import card
from tests.conftest import ROOT, tiny_hf_model

TOKENIZER = ROOT / "tests" / "fixtures" / "phi3_tokenizer"
TOPICS = "tea rain bread stars trains glass rivers snow paper drums lamps maps".split()


def save_base(directory: Path, **settings) -> Path:
    """A HF directory: narrow layers with two heads that share their keys, the real tokenizer."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"eos_token_id": 32000, "pad_token_id": 32000}
    tiny_hf_model(**heads | ends | settings).save_pretrained(directory)
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Curves take a sixth of a tiny run's time, and only tests of reports and cards need them."""
    if not request.path.stem.startswith(("test_report", "test_card")):
        monkeypatch.setattr(charts, "to_svg", lambda chart: "<svg />")
        monkeypatch.setattr(card, "to_png", lambda chart: b"")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A HF directory: two narrow layers, the vocabulary of the real tokenizer."""
    return save_base(
        tmp_path_factory.mktemp("phi3"),
        vocab_size=32064,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        initializer_range=0.1,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
    )


@pytest.fixture(scope="module")
def gs():
    """An emulated bucket of Google's, `gs://bucket`; skips without the extra `emulators`."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        yield "gs://bucket"
    server.stop()
    fsspec.filesystem("gcs").clear_instance_cache()


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Twelve chats of unequal lengths."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with file.open("w") as out:
        for n, topic in enumerate(TOPICS, start=1):
            turns = [
                {"role": "user", "content": f"Tell me about {topic}. " * (n % 3 + 1)},
                {"role": "assistant", "content": f"{topic.title()} are what they are. " * n},
            ]
            out.write(json.dumps({"messages": turns * (n % 2 + 1)}) + "\n")
    return file


def make_config(
    checkpoint: Path, chats: Path, output: Path, data: dict | None = None, **training
) -> RunConfig:
    """A config for six steps on the tiny model."""
    defaults = {
        "output_dir": str(output),
        "seed": 1,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": ["none"],
    }
    return RunConfig.model_validate(
        {
            "model": {"path": str(checkpoint)},
            "peft": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "data": {"path": str(chats), "max_length": 128, "pad_to_multiple_of": 128}
            | (data or {}),
            "training": defaults | training,
            "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1},  # not all eight devices
        }
    )


def write_config(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump()))
    return path


def count_reads(monkeypatch) -> collections.Counter[str]:
    """Counts from now on, by name: JSON files read, headers parsed, and models made (`Phi3`).

    Of what this program does; the tokenizer's loader in transformers reads config.json by itself.
    """
    counts: collections.Counter[str] = collections.Counter()
    read_text, read_header, init = Path.read_text, index._read_header, Phi3.__init__

    def counting_text(self, *args, **kwargs):
        counts[self.name] += self.suffix == ".json"
        return read_text(self, *args, **kwargs)

    def counting_header(file):
        counts[file.name] += 1
        return read_header(file)

    def counting_init(self, *args, **kwargs):
        counts["Phi3"] += 1
        init(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counting_text)
    monkeypatch.setattr(index, "_read_header", counting_header)
    monkeypatch.setattr(Phi3, "__init__", counting_init)
    return counts
