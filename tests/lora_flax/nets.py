"""Two small networks, each in NNX and in PyTorch, under the same names and weights.

    encoder.0.proj, encoder.0.norm, encoder.1.proj ..., head     a list of blocks
    layers.0.attn.qkv_proj, layers.0.up_proj ..., lm_head        a stack, scanned here

Linear layers have a bias except where PyTorch's Phi-3 has none, so that `bias` has work to do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

WIDTH, HIDDEN, DEPTH = 6, 10, 3


class Dense(nnx.Module):
    """A layer that takes a key, as those of a model with its own dropout do."""

    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * 0.3)

    def __call__(self, x, *, key=None):
        return x @ self.kernel[...].astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.norm(self.proj(x)))


class Listed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        for block in self.encoder:
            x = block(x)
        return self.head(x)


class Attention(nnx.Module):
    def __init__(self, lead: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.qkv_proj = Dense((*lead, WIDTH, WIDTH), rngs=rngs, dtype=dtype)

    def __call__(self, x, *, key=None):
        return self.qkv_proj(x, key=key)


class Layer(nnx.Module):
    def __init__(self, lead: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.attn = Attention(lead, rngs, dtype)
        self.up_proj = Dense((*lead, WIDTH, HIDDEN), rngs=rngs, dtype=dtype)
        self.down_proj = Dense((*lead, HIDDEN, WIDTH), rngs=rngs, dtype=dtype)

    def __call__(self, x, *, key=None):
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = x + self.attn(x, key=keys[0])
        return x + self.down_proj(jnp.tanh(self.up_proj(x, key=keys[1])), key=keys[2])


class Stacked(nnx.Module):
    """One `Layer` whose arrays have DEPTH in front, run by `jax.lax.scan`."""

    def __init__(self, rngs: nnx.Rngs, dtype=jnp.float32):
        self.layers = Layer((DEPTH,), rngs, dtype)
        self.layers.stack_size = DEPTH
        self.lm_head = Dense((WIDTH, 8), rngs=rngs, dtype=dtype)

    def __call__(self, x, *, key=None):
        graphdef, state = nnx.split(self.layers)

        def body(x, xs):
            layer_state, layer_key = xs
            return nnx.merge(graphdef, layer_state)(x, key=layer_key), None

        keys = None if key is None else jax.random.split(key, DEPTH)
        x, _ = jax.lax.scan(body, x, (state, keys))
        return self.lm_head(x)


class Unrolled(nnx.Module):
    """The same network as a list of layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer((), rngs, jnp.float32) for _ in range(DEPTH)])
        self.lm_head = Dense((WIDTH, 8), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.proj(x)))


class TorchListed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.ModuleList([TorchBlock() for _ in range(2)])
        self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x):
        for block in self.encoder:
            x = block(x)
        return self.head(x)


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.qkv_proj(x)


class TorchLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = TorchAttention()
        self.up_proj = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class TorchStacked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([TorchLayer() for _ in range(DEPTH)])
        self.lm_head = torch.nn.Linear(WIDTH, 8, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def to_torch(model: nnx.Module) -> torch.nn.Module:
    """The PyTorch twin of a plain (unwrapped) `Listed` or `Stacked`."""
    twin = TorchListed() if isinstance(model, Listed) else TorchStacked()
    weights = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parts, last = (str(part) for part in path)
        value = np.array(variable.get_value())
        for index in range(DEPTH) if isinstance(model, Stacked) and parts[0] == "layers" else [-1]:
            member = value if index < 0 else value[index]
            names = parts if index < 0 else ["layers", str(index), *parts[1:]]
            key = ".".join([*names, "bias" if last == "bias" else "weight"])
            weights[key] = torch.tensor(member.T if last == "kernel" else member)
    twin.load_state_dict(weights)
    return twin


def batch(rows: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def randomize(model: nnx.Module, seed: int = 1) -> None:
    """Gives every A and B of a wrapped model values away from their start."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.LoRAParam)
    moved = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), state)
    nnx.update(model, moved)


def arrays(model: nnx.Module, *filters) -> dict[str, np.ndarray]:
    """Variables by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model, *filters))
    return {".".join(str(p) for p in path): np.array(v.get_value()) for path, v in flat}
