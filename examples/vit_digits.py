"""LoRA for a model of your own: a vision transformer in Flax NNX, trained on handwritten digits.

    pip install scikit-learn
    python examples/vit_digits.py

The base learns upright digits (8 x 8 pixels, 1,797 images that come with scikit-learn). Then it is
frozen, and an adapter of 8 % of its size learns the same digits turned by 90 degrees. The adapter
is saved as a PEFT file and loaded into a copy of the base. About a minute on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_flax

PATCH, WIDTH, HEADS, DEPTH = 2, 64, 4, 2


# --- The model: nothing in it knows of LoRA -------------------------------------------------------


class Attention(nnx.Module):
    """Self-attention over all patches."""

    def __init__(self, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, patches, _ = x.shape  # [B, P, D]
        qkv = self.qkv(x).reshape(batch, patches, 3, HEADS, WIDTH // HEADS)
        out = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(out.reshape(batch, patches, WIDTH))


class Block(nnx.Module):
    """A layer, with its norms first."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = Attention(rngs)
        self.fc1 = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.fc2 = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """Images `[B, 8, 8]` to logits `[B, 10]`."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(PATCH * PATCH, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.02 * rngs.params.normal((16, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, side = len(images), 8 // PATCH
        patches = images.reshape(batch, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
        x = self.embed(patches.reshape(batch, side * side, -1)) + self.place[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


# --- Training: the same for the base and for the adapter ------------------------------------------


def train(model: ViT, trains: nnx.filterlib.Filter, data: tuple, steps: int, rate: float) -> None:
    """Train the chosen parameters in place; the others have no gradient and no optimizer state."""
    images, labels = data
    graphdef, trainable, frozen = nnx.split(model, trains, ...)
    tx = optax.adamw(optax.cosine_decay_schedule(rate, steps))

    def loss(trainable: nnx.State, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, trainable, frozen)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(trainable, state, x, y):
        updates, state = tx.update(jax.grad(loss)(trainable, x, y), state, trainable)
        return optax.apply_updates(trainable, updates), state

    state, rows = tx.init(trainable), np.random.default_rng(0)
    for _ in range(steps):
        chosen = rows.integers(len(images), size=128)
        trainable, state = step(trainable, state, images[chosen], labels[chosen])
    nnx.update(model, trainable)


@nnx.jit
def recognized(model: ViT, images: jax.Array) -> jax.Array:
    """The most likely digit of each image."""
    return model(images).argmax(-1)


def accuracy(model: ViT, data: tuple) -> float:
    """Share of the images that are recognized."""
    images, labels = data
    return float((recognized(model, images) == labels).mean())


def digits(turned: bool) -> tuple[tuple, tuple]:
    """Images `[n, 8, 8]` in [0, 1] and labels: 1,500 to train on, 297 to test with."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    images, labels = bunch.images[order].astype(np.float32) / 16, bunch.target[order]
    if turned:
        images = np.rot90(images, axes=(1, 2)).copy()
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def main() -> None:
    """Train the base, adapt it, save the adapter, load it again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of the base and of the adapter")
    parser.add_argument("--output", type=Path, default=Path("vit-adapter"))
    args = parser.parse_args()
    upright, turned = digits(turned=False), digits(turned=True)

    model = ViT(nnx.Rngs(0))
    train(model, nnx.Param, upright[0], args.steps, 2e-3)
    base = nnx.clone(model)
    print(f"base: {accuracy(base, upright[1]):.1%} of upright digits, ", end="")
    print(f"{accuracy(base, turned[1]):.1%} of turned ones")

    config = lora_flax.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "proj", "fc1", "fc2"])
    print(lora_flax.format_table(lora_flax.wrap(model, config, rngs=nnx.Rngs(1))))
    trains = lora_flax.mark_only_lora_as_trainable(model)
    train(model, trains, turned[0], args.steps, 1e-2)
    print(f"with the adapter: {accuracy(model, turned[1]):.1%} of turned digits")

    lora_flax.save_peft(model, args.output, task_type=None)
    lora_flax.load_peft(base, args.output)
    print(f"loaded from {args.output}: {accuracy(base, turned[1]):.1%}")


if __name__ == "__main__":
    main()
