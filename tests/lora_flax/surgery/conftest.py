"""Several adapters on one model, here and in PEFT."""

import peft
import pytest
from flax import nnx

import lora_flax
from tests.lora_flax.encoder import Encoder, peft_model, shake_torch

FIELDS = {
    "one": {"r": 2, "lora_alpha": 3, "target_modules": ["qkv_proj", "up_proj", "embed_tokens"]},
    "two": {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["up_proj", "head"]},
    "three": {"r": 2, "lora_alpha": 8, "target_modules": ["layers.1.down_proj", "qkv_proj"]},
}


@pytest.fixture
def pair(tmp_path):
    """A model here and PEFT's twin with the same three adapters."""
    model = Encoder(nnx.Rngs(0))
    base = peft_model(model, **FIELDS["one"])
    inner = base.unload()
    twin = None
    for seed, (name, fields) in enumerate(FIELDS.items()):
        config = peft.LoraConfig(**fields)
        if twin is None:
            twin = peft.get_peft_model(inner, config, adapter_name=name)
        else:
            twin.add_adapter(name, config)
        twin.set_adapter(name)
        shake_torch(twin, seed)
    twin.save_pretrained(str(tmp_path))
    for name in FIELDS:
        lora_flax.load_peft(model, tmp_path / name, adapter_name=name)
    return model, twin
