"""What a run reads of its base model."""

from __future__ import annotations

from phi3_jax.config.sections import MeshConfig, QuantizationConfig
from phi3_jax.training.loop import train
from tests.phi3_jax.conftest import count_reads, make_config


def test_a_run_reads_its_base_once(checkpoint, chats, tmp_path, monkeypatch):
    """config.json and the header once, one abstract model: to choose the mesh and to load."""
    config = make_config(checkpoint, chats, tmp_path, max_steps=1, save_steps=1)
    quantization = QuantizationConfig(load_in_4bit=True)
    config = config.model_copy(
        update={
            "mesh": MeshConfig(),
            "model": config.model.model_copy(update={"quantization": quantization}),
            # Reads kernels from the files again.
            "peft": config.peft.model_copy(update={"init_lora_weights": "loftq"}),
        }
    )
    read = count_reads(monkeypatch)
    train(config)
    assert {name: read[name] for name in ("config.json", "model.safetensors", "Phi3")} == {
        "config.json": 1,
        "model.safetensors": 1,
        "Phi3": 1,
    }
