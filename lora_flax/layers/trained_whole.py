"""What trains in full alongside the updates: `modules_to_save` and individual embedding rows.

Like the layer wrappers, both kinds replace the original module and leave it unchanged:

    lm_head: Dense        lm_head: TrainedCopy
                              base: Dense
                              adapters
                                  default: Dense      float32, trained
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_flax.errors import LoraError


class SavedModule(nnx.Module):
    """A module with trained replacements by adapter name; the last active one present is used."""

    def __init__(self, base: nnx.Module):
        self.base = base
        self.adapters: Any = nnx.Dict()
        self.active: tuple[str, ...] = ()

    @property
    def in_use(self) -> Any:
        """The active replacement, or None if the base is used."""
        names = [name for name in self.active if name in self.adapters]
        return self.adapters[names[-1]] if names else None

    def folded(self) -> nnx.Module:
        """The plain module that computes the same function as this one."""
        raise NotImplementedError


class TrainedCopy(SavedModule):
    """Calls a trained copy instead of the base.

    The copy is stored in float32 and computes in the base's dtype. As in PEFT, an output head tied
    to an embedding (`attend`) keeps reading the base.
    """

    def add(self, name: str) -> None:
        """Adds a copy under that name."""
        copy = nnx.clone(self.base)
        state = nnx.state(copy, nnx.Param)
        nnx.update(copy, jax.tree.map(lambda value: value.astype(jnp.float32), state))
        self.adapters[name] = copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the base's `__call__`."""
        return self.folded()(*args, **kwargs)

    def attend(self, x: jax.Array) -> jax.Array:
        """Same as the base's `attend`."""
        base: Any = self.base
        scores: jax.Array = base.attend(x)
        return scores

    def folded(self) -> nnx.Module:
        if self.in_use is None:
            return self.base
        graphdef, state = nnx.split(self.in_use)
        like = nnx.state(self.base)
        cast = jax.tree.map(lambda v, b: v.astype(b.dtype), state, like)
        copy: nnx.Module = nnx.merge(graphdef, cast)
        return copy


class TokenRows(nnx.Module):
    """Trained rows of an embedding: `rows` `[n, features]` float32, for the token ids `ids`."""

    def __init__(self, ids: tuple[int, ...], rows: jax.Array):
        self.ids = ids
        self.rows = nnx.LoRAParam(rows.astype(jnp.float32))


class TrainedTokens(SavedModule):
    """An embedding with some of its rows replaced by trained ones.

    As in PEFT, a tied output head (`attend`) uses the trained rows too.
    """

    def add(self, name: str, ids: tuple[int, ...]) -> None:
        """Adds rows under that name, initialized from the embedding's own.

        Raises:
            LoraError: for an id that is not in the embedding.
        """
        base: Any = self.base
        table: jax.Array = base.embedding[...]
        beyond = [i for i in ids if i >= table.shape[0]]
        if beyond:
            raise LoraError(
                f"trainable_token_indices {beyond}: the embedding has {table.shape[0]} rows"
            )
        self.adapters[name] = TokenRows(ids, table[jnp.array(ids)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `[..., features]` of token ids."""
        y: jax.Array = self.base(tokens)
        trained = self.in_use
        if trained is None:
            return y
        match = tokens[..., None] == jnp.array(trained.ids)  # [..., n]
        rows = trained.rows[...].astype(y.dtype)[jnp.argmax(match, axis=-1)]
        return jnp.where(match.any(axis=-1)[..., None], rows, y)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of `x` `[..., features]` against every row."""
        base: Any = self.base
        scores: jax.Array = base.attend(x)
        trained = self.in_use
        if trained is None:
            return scores
        new = x @ trained.rows[...].astype(x.dtype).T
        return scores.at[..., jnp.array(trained.ids)].set(new.astype(scores.dtype))

    def folded(self) -> nnx.Module:
        if self.in_use is None:
            return self.base
        copy = nnx.clone(self.base)
        layer: Any = copy
        table: jax.Array = layer.embedding[...]
        rows = self.in_use.rows[...].astype(table.dtype)
        layer.embedding.set_value(table.at[jnp.array(self.in_use.ids)].set(rows))
        return copy
