"""LoRA-Muon: Muon's steepest descent in the spectral norm, for the product of A and B.

Cesista, Simal, Crowson, Biderman, "LoRA-Muon: Spectral Steepest Descent on the Low-Rank Manifold",
2026, arXiv:2606.12921. With the update of the weight W = A B, the momenta m and the learning rate
eta, one step is

    A -> s A - eta / (2 s) msign(m_A R_B) R_B      R_B = (B B^T)^(-1/2)
    B -> s B - eta / (2 s) R_A msign(R_A m_B)      R_A = (A^T A)^(-1/2)

where msign(U S V^T) = U V^T and s = sqrt(1 - eta * weight_decay): to first order W decays by
`eta * weight_decay` and moves by a matrix of spectral norm `eta` or less. The step of W does not
change if A is multiplied and B divided by the same number.

The directions were compared with those that the paper's first author gives in "LoRA-Muon-OGD"
(leloykun.github.io, June 2026), where B is `[out, r]`; momentum and weight decay with a published
summary of the paper's algorithm, as its full text was not at hand. The roots come from an
eigendecomposition, exactly, where the paper iterates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_flax.optimizers.parts import Parts
from lora_flax.targets.naming import Path
from lora_flax.trainable import names_of

# Added to a Gram matrix of norm 1 before its root is inverted (the paper's appendix B.4).
DAMPING = 1e-5
# An odd polynomial of degree 5 per step, which together map (0, 1] close to 1 (Amsel et al. 2025,
# "The Polar Express", arXiv:2505.16932).
_POLAR_EXPRESS = (
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
    (1.8648, -1.2224, 0.3577),
)


def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    parts: Mapping[Path, Parts],
    momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """LoRA-Muon for a tree of `lora_A` and `lora_B` arrays.

    Its state has the steps taken, `count`, and the momentum of each array, `mu`.

    The scale `lora_alpha / r` is not part of A and B: where it is not 1, the step of the layer's
    weight is that many times as large. While B is zero, A does not move.

    Args:
        learning_rate: the spectral norm of a step of A B.
        parts: from `array_parts`, for every array of the tree.
        momentum: decay of the gradients' moving average.
        weight_decay: decay of A B; times the learning rate it must stay below 1.
    """

    def init(params: optax.Params) -> dict[str, Any]:
        mu = jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.zeros((), jnp.int32), "mu": mu}

    def update(
        updates: optax.Updates, state: dict[str, Any], params: optax.Params | None = None
    ) -> tuple[optax.Updates, dict[str, Any]]:
        if params is None:
            raise ValueError("lora_muon needs the parameters")
        rate = learning_rate(state["count"]) if callable(learning_rate) else learning_rate
        keep = jnp.sqrt(1.0 - jnp.asarray(rate, jnp.float32) * weight_decay)
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state["mu"], updates)
        arrays, momenta = _by_path(params), _by_path(mu)
        steps = {}
        for path, array in arrays.items():
            if path[-1] == "lora_A":
                other = (*path[:-1], "lora_B")
                own, theirs = parts[path], parts[other]
                pairs = zip(
                    own.split(array), theirs.split(arrays[other]),
                    own.split(momenta[path]), theirs.split(momenta[other]), strict=True,
                )  # fmt: skip
                moves = [directions(*pair) for pair in pairs]
                steps[path] = own.join([a for a, _ in moves], array)
                steps[other] = theirs.join([b for _, b in moves], arrays[other])
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        new = [
            (keep - 1.0) * leaf - rate / keep * steps[names_of(key_path)]
            for key_path, leaf in flat
        ]  # fmt: skip
        return jax.tree.unflatten(treedef, new), {"count": state["count"] + 1, "mu": mu}

    return optax.GradientTransformation(init, update)


def directions(
    a: jax.Array, b: jax.Array, m_a: jax.Array, m_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The steps of A `[..., in, r]` and B `[..., r, out]` for a learning rate of 1, to subtract."""
    with jax.default_matmul_precision("highest"):
        root_a = _inverse_root(a.mT @ a)
        root_b = _inverse_root(b @ b.mT)
        return 0.5 * _msign(m_a @ root_b) @ root_b, 0.5 * root_a @ _msign(root_a @ m_b)


def _inverse_root(gram: jax.Array) -> jax.Array:
    """The damped inverse square root of `[..., r, r]`; zero for a matrix that is zero."""
    norm = jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True)
    nonzero = norm > 0
    norm = jnp.where(nonzero, norm, 1.0)
    values, vectors = jnp.linalg.eigh(gram / norm + DAMPING * jnp.eye(gram.shape[-1]))
    # Rounding may take an eigenvalue below the damping that was added to it.
    roots = jax.lax.rsqrt(jnp.maximum(values, DAMPING))
    inverse = (vectors * roots[..., None, :]) @ vectors.mT
    return jnp.where(nonzero, inverse * jax.lax.rsqrt(norm), 0.0)


def _msign(matrix: jax.Array) -> jax.Array:
    """The nearest matrix `[..., m, n]` whose singular values are all 1; zero stays zero."""
    if matrix.shape[-2] > matrix.shape[-1]:
        return _msign(matrix.mT).mT
    norm = jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    matrix = matrix / jnp.where(norm > 0, norm, 1.0)
    for a, b, c in _POLAR_EXPRESS:
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix


def _by_path(tree: Any) -> dict[Path, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {names_of(key_path): leaf for key_path, leaf in leaves}
