"""Dropout whose mask costs a few operations a value, and is computed again instead of stored.

`jax.random.bernoulli` runs 20 rounds of threefry for every value. Here threefry gives two random
words for each vector of the last axis, and a value's bits are a mix of these and its index: two
multiplications, as in the finalizers of MurmurHash3 (Appleby 2011), with the constants of Wellons's
`lowbias32` (2018).

A value's fate depends on the key and its place, on nothing else: not on the device, on how the
array is sharded, on `vmap`, nor on how many rows and positions come after it, so that padding a
batch changes no mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@jax.named_scope("dropout")
def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Zero each value with probability `rate` and divide the others by `1 - rate`.

    Args:
        x: `[..., features]`.
        key: PRNG key; distinct keys give independent masks.
        rate: in [0, 1); applied to within 2**-32.

    Returns:
        An array like `x`.
    """
    return drop(x, random_words(key, x.shape[:-1]), rate)


def drop(x: jax.Array, words: jax.Array, rate: float) -> jax.Array:
    """`dropout` with the words of its key (`random_words`)."""
    # The backward pass keeps the words, not the mask: 8 bytes a vector instead of 1 a value.
    apply = jax.checkpoint(functools.partial(_apply, rate=rate), prevent_cse=False)
    dropped: jax.Array = apply(x, words)
    return dropped


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Two random words for each vector, uint32 `[*shape, 2]`."""
    if not shape:
        return jax.random.bits(key, (2,), "uint32")
    keys = jax.random.split(key, shape[:-1])
    of_row = functools.partial(jax.random.bits, shape=(shape[-1], 2), dtype="uint32")
    for _ in shape[:-1]:
        of_row = jax.vmap(of_row)
    words: jax.Array = of_row(keys)
    return words


def _apply(x: jax.Array, words: jax.Array, rate: float) -> jax.Array:
    keep = random_bits(words, x.shape[-1]) >= threshold(rate)
    dropped: jax.Array = jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
    return dropped


def threshold(rate: float) -> jax.Array:
    """A value is kept if its bits are at least this."""
    lowest: jax.Array = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return lowest


def random_bits(words: jax.Array, features: int, start: jax.Array | int = 0) -> jax.Array:
    """uint32 `[..., features]` from two random words for each vector, uint32 `[..., 2]`.

    `start` is the index in its vector of the first of these features.
    """
    first, second = words[..., :1], words[..., 1:]
    shape = (*(1,) * (words.ndim - 1), features)
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, words.ndim - 1)
    index = index + jnp.asarray(start).astype(jnp.uint32)
    bits = first + index * jnp.uint32(0x9E3779B9)  # odd: no two values of a vector are alike
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    # Vectors whose first words are close would otherwise have shifted copies of one mask.
    bits = bits ^ second
    # No last shift: only the low bits would gain from it, and a comparison depends on the high.
    mixed: jax.Array = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return mixed
