"""Modules that train in full or were replaced, and what depends on them."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.encoder import VOCAB
from tests.lora_flax.nets import WIDTH, arrays, batch


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, norm: bool):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if norm else nnx.LayerNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(x)))


class Classifier(nnx.Module):
    def __init__(self, norm: bool = False):
        rngs = nnx.Rngs(0, dropout=1)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = Head(rngs, norm)

    def __call__(self, x):
        return self.head(self.proj(x))


class TiedHead(nnx.Module):
    def __init__(self):
        self.tied_shape = (WIDTH, VOCAB)

    def __call__(self, x, embedding):
        return embedding.attend(x)


class Tied(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.embed_tokens.tied_head = "lm_head"
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.lm_head = TiedHead()

    def __call__(self, tokens):
        return self.lm_head(self.proj(self.embed_tokens(tokens)), self.embed_tokens)


CONFIG = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"])


def test_dropout_inside_draws_on():
    """Its random state is the base's, so each call drops other values, as in the plain model."""
    plain, model = Classifier(), Classifier()
    lora_flax.wrap(model, CONFIG)
    x = batch()
    outputs = [model(x) for _ in range(2)]
    for output in outputs:
        np.testing.assert_allclose(output, plain(x), rtol=1e-6, atol=1e-6)
    assert abs(outputs[0] - outputs[1]).max() > 0.1
    step = nnx.jit(lambda model: model(x))
    for _ in range(2):
        np.testing.assert_allclose(step(model), plain(x), rtol=1e-6, atol=1e-6)
    model.eval()
    plain.eval()
    trains = lora_flax.mark_only_lora_as_trainable(model)
    assert not any("rngs" in name for name in arrays(model, trains))
    nnx.update(model, jax.tree.map(lambda a: a + 0.5, nnx.state(model, trains)))
    out = model(x)
    assert abs(out - plain(x)).max() > 0.1
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(model(x), out, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_refused():
    model = Classifier(norm=True)
    before = arrays(model, nnx.Param).keys()
    with pytest.raises(LoraError, match=r"head has running .*\(head.norm.mean, head.norm.var\)"):
        lora_flax.wrap(model, CONFIG)
    assert arrays(model, nnx.Param).keys() == before


def test_a_quantized_layer_is_refused():
    """Also one with a bias, which alone would train."""
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        proj=nnx.Linear(64, 64, rngs=rngs), head=nnx.Dict(out=nnx.Linear(64, 4, rngs=rngs))
    )
    lora_flax.quantize(model, lora_flax.BitsAndBytesConfig(load_in_8bit=True))
    for name in ("head", "out"):
        with pytest.raises(LoraError, match="modules_to_save: head.out is quantized"):
            lora_flax.wrap(model, LoraConfig(r=2, target_modules=["proj"], modules_to_save=[name]))


def resized(folder, rows: int = VOCAB + 2) -> Tied:
    """A model with an adapter whose file has more rows of the embedding."""
    model = Tied()
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["proj"]))
    lora_flax.save_peft(model, folder)
    file = folder / "adapter_model.safetensors"
    table = np.ones((rows, WIDTH), np.float32)
    tensors = load_file(file) | {"base_model.model.embed_tokens.weight": table}
    save_file(tensors, file, {"format": "pt"})
    model = Tied()
    lora_flax.load_peft(model, folder)
    return model


def test_a_tied_head_has_the_rows_of_the_embedding_in_use(tmp_path):
    """Also after what resized it was switched off, removed, or refused halfway."""
    ids = np.arange(3)
    for leave in (lora_flax.unwrap, lambda model: lora_flax.delete_adapter(model, "default")):
        model = resized(tmp_path)
        assert model(ids).shape == (3, VOCAB + 2) == (3, model.lm_head.tied_shape[1])
        leave(model)
        lora_flax.add_adapter(model, "head", LoraConfig(r=2, target_modules=["lm_head"]))
        assert model(ids).shape == (3, VOCAB)
    model = resized(tmp_path)
    lora_flax.add_adapter(model, "plain", LoraConfig(r=2, target_modules=["proj"]))
    assert model(ids).shape == (3, VOCAB)
    lora_flax.add_adapter(model, "head", LoraConfig(r=2, target_modules=["lm_head"]))
    out = model(ids)
    assert out.shape == (3, VOCAB)
    lora_flax.set_adapter(model, "default")
    with lora_flax.mixed_batch(model, ["head"] * 3):
        np.testing.assert_allclose(model(ids), out, rtol=1e-6)
    lora_flax.set_adapter(model, "plain")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.proj.lora_A.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoraError, match="missing"):
        lora_flax.load_peft(model, tmp_path)
    np.testing.assert_allclose(model(ids), out, rtol=1e-6)
    assert model.lm_head.plain.tied_shape == (WIDTH, VOCAB)
