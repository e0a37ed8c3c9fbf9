"""A text encoder in NNX and in PyTorch, under the same names and weights.

    embed_tokens, conv, layers.0.attn.qkv_proj, layers.0.up_proj, layers.0.down_proj ..., head

Everything that an adapter can stand on: an embedding, a convolution, a stack of layers with a fused
projection, a norm and a head with a bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

import lora_flax
from tests.lora_flax.nets import DEPTH, HIDDEN, WIDTH, Layer, TorchLayer

VOCAB, CLASSES = 11, 8
SLICES = (("q_proj", 3), ("k_proj", 1), ("v_proj", 2))


class Encoder(nnx.Module):
    """Tokens `[B, S]` to scores `[B, S, CLASSES]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), padding=1, rngs=rngs)
        self.layers = Layer((DEPTH,), rngs, jnp.float32)
        self.layers.attn.qkv_proj.slices = SLICES
        self.layers.stack_size = DEPTH
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, tokens, *, key=None):
        x = jnp.tanh(self.conv(self.embed_tokens(tokens)))
        graphdef, state = nnx.split(self.layers)

        def body(x, xs):
            layer_state, layer_key = xs
            return nnx.merge(graphdef, layer_state)(x, key=layer_key), None

        keys = None if key is None else jax.random.split(key, DEPTH)
        x, _ = jax.lax.scan(body, x, (state, keys))
        return self.head(self.norm(x))


class TorchEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, WIDTH)
        self.conv = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.layers = torch.nn.ModuleList([TorchLayer() for _ in range(DEPTH)])
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        x = self.embed_tokens(tokens).transpose(1, 2)
        x = torch.tanh(self.conv(x)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class TorchUnfused(torch.nn.Module):
    """An attention that holds its projections apart."""

    def __init__(self):
        super().__init__()
        for name, size in SLICES:
            setattr(self, name, torch.nn.Linear(WIDTH, size, bias=False))

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name, _ in SLICES], dim=-1)


def to_torch(model: Encoder, unfused: bool = False) -> TorchEncoder:
    """The PyTorch twin of a plain encoder."""
    twin = TorchEncoder()
    weights = {
        "embed_tokens.weight": model.embed_tokens.embedding[...],
        "conv.weight": np.moveaxis(np.array(model.conv.kernel[...]), (-1, -2), (0, 1)),
        "conv.bias": model.conv.bias[...],
        "norm.weight": model.norm.scale[...],
        "norm.bias": model.norm.bias[...],
        "head.weight": model.head.kernel[...].T,
        "head.bias": model.head.bias[...],
    }
    for index in range(DEPTH):
        for name in ("attn.qkv_proj", "up_proj", "down_proj"):
            module = model.layers.attn.qkv_proj if "qkv" in name else getattr(model.layers, name)
            weights[f"layers.{index}.{name}.weight"] = module.kernel[...][index].T
    if unfused:
        for index, layer in enumerate(twin.layers):
            layer.attn = TorchUnfused()
            fused, at = weights.pop(f"layers.{index}.attn.qkv_proj.weight"), 0
            for name, size in SLICES:
                weights[f"layers.{index}.attn.{name}.weight"] = fused[at : at + size]
                at += size
    twin.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()})
    return twin


def tokens(rows: int = 4, length: int = 7) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (rows, length)).astype(np.int32)


def torch_output(twin: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return twin.eval()(torch.tensor(tokens(), dtype=torch.long)).numpy()


def shake_torch(twin: torch.nn.Module, seed: int = 0) -> None:
    """Moves everything that trains away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def peft_model(model: Encoder, unfused: bool = False, **fields) -> peft.PeftModel:
    """PEFT's adapter on the twin, as it starts."""
    return peft.get_peft_model(to_torch(model, unfused), peft.LoraConfig(**fields))


def trained(model: nnx.Module, steps: int = 2) -> None:
    """Moves all that trains by gradient steps, as a user would."""
    trains = lora_flax.mark_only_lora_as_trainable(model)
    graphdef, trainable, frozen = nnx.split(model, trains, ...)

    def loss(trainable):
        return (nnx.merge(graphdef, trainable, frozen)(tokens()) ** 2).sum()

    # Signs, so that small gradients move as far as large ones, as in Adam.
    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), t, jax.grad(loss)(t)))
    for _ in range(steps):
        trainable = step(trainable)
    nnx.update(model, trainable)


__all__ = ["CLASSES", "HIDDEN", "SLICES", "VOCAB", "Encoder", "TorchEncoder"]
