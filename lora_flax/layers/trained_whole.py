"""What trains in full alongside the updates: `modules_to_save` and individual embedding rows.

Like the layer wrappers, these replace the original module and leave it unchanged:

    lm_head: Dense        lm_head: TrainedCopy
                              base: Dense
                              adapters
                                  default: Dense      float32, trained

An embedding whose transpose is also the output head (it has an `attend`) names that head in a
static attribute, `tied_head = "lm_head"`. As in PEFT, what trains under the head's name then
changes the head alone:

    embed_tokens: Embed   embed_tokens: TrainedHead   `attend` uses the trained weights,
                              base: Embed             a call the base's
                              adapters
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flax.errors import LoraError

_WEIGHTS = ("embedding", "kernel")


class Members(nnx.Variable[Any]):
    """Which members of a stack are trained, bool `[*stack]`; never trained itself.

    Its metadata `chosen` holds the same as a flat tuple, known without reading the array.
    """


class Replacement(nnx.Variable[Any]):
    """A weight that an adapter's file puts in place of the base's; never trained."""


class SavedModule(nnx.Module):
    """A module with trained replacements by adapter name; the last active one present is used."""

    def __init__(self, base: nnx.Module):
        self.base = base
        self.adapters: Any = nnx.Dict()
        self.active: tuple[str, ...] = ()

    @property
    def used_name(self) -> str | None:
        """The name of the active replacement, or None if the base is used."""
        names = [name for name in self.active if name in self.adapters]
        return names[-1] if names else None

    @property
    def in_use(self) -> Any:
        """The active replacement, or None if the base is used."""
        name = self.used_name
        return None if name is None else self.adapters[name]

    @property
    def plain(self) -> Any:
        """The module itself, below everything that is trained."""
        return self.base.plain if isinstance(self.base, SavedModule) else self.base

    @property
    def adaptable(self) -> bool:
        """Whether the layer can have an update as well."""
        return False

    def folded(self) -> nnx.Module:
        """The plain module that computes the same function as this one."""
        raise NotImplementedError


class TrainedCopy(SavedModule):
    """Calls a trained copy instead of the base.

    The copy is stored in float32 and computes in the base's dtype. What is not a parameter, such as
    the random state of dropout, is the base's own. As in PEFT, an output head tied to an embedding
    (`attend`) keeps reading the base.

    Attributes:
        members: for a copy of some members of a stack, which ones, by adapter name.
    """

    def __init__(self, base: nnx.Module):
        super().__init__(base)
        self.members: Any = nnx.Dict()

    def add(self, name: str, members: np.ndarray | None = None) -> None:
        """Adds a copy under that name.

        Args:
            name: name of the adapter.
            members: bool `[*stack]`, the members of a stack that train; None for all. The copy
                holds all members, and the others are not used.
        """
        copy = nnx.clone(self.plain)
        for weight in _WEIGHTS:
            if isinstance(variable := getattr(copy, weight, None), Replacement):
                setattr(copy, weight, nnx.Param(variable[...]))
        state = nnx.state(copy, nnx.Param)
        nnx.update(copy, jax.tree.map(lambda value: value.astype(jnp.float32), state))
        self.adapters[name] = copy
        if name in self.members:
            del self.members[name]
        if members is not None and not members.all():
            chosen = tuple(members.reshape(-1).tolist())
            self.members[name] = Members(jnp.asarray(members), chosen=chosen)

    @property
    def adaptable(self) -> bool:
        return bool(self.members)  # the members that do not train in full

    def chosen(self, name: str) -> tuple[bool, ...] | None:
        """Which members of the stack an adapter trains, in order; None if all."""
        members: tuple[bool, ...] | None = None
        if name in self.members:
            members = self.members[name].chosen
        return members

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the base's `__call__`."""
        called: Any = self.folded()
        return called(*args, **kwargs)

    def attend(self, x: jax.Array) -> jax.Array:
        """Same as the base's `attend`."""
        base: Any = self.base
        scores: jax.Array = base.attend(x)
        return scores

    def folded(self) -> nnx.Module:
        name = self.used_name
        if name is None:
            return self.base
        trained = dict(nnx.to_flat_state(nnx.state(self.adapters[name], nnx.Param)))
        mask = self.members[name][...] if name in self.members else None
        graphdef, state = nnx.split(self.plain)
        new = []
        for path, variable in nnx.to_flat_state(state):
            if path in trained:
                old = variable.get_value()
                value = trained[path].get_value().astype(old.dtype)
                if mask is not None:
                    wide = mask.reshape(*mask.shape, *(1,) * (old.ndim - mask.ndim))
                    value = jnp.where(wide, value, old)
                variable = variable.replace(value)
            new.append((path, variable))
        copy: nnx.Module = nnx.merge(graphdef, nnx.from_flat_state(new))
        return copy


class ReplacedBase(SavedModule):
    """Calls the module with the frozen weight of an adapter's file in place of the base's.

    PEFT saves the embedding and the head in full after a resize, or with `save_embedding_layers`,
    and puts them into the base when it loads the file. They may have more rows than the base's. A
    head tied to the embedding uses them too.
    """

    def put(self, name: str, weight: np.ndarray) -> None:
        """Adds and activates the weight `[rows, features]`; kept in the base's dtype."""
        copy: Any = nnx.clone(self.base)
        kind = _weight_name(copy)
        table = jnp.asarray(weight, getattr(copy, kind)[...].dtype)
        setattr(copy, kind, Replacement(table if kind == "embedding" else table.T))
        self.adapters[name] = copy
        self.active = (name,)

    @property
    def plain(self) -> Any:
        return self.base if self.in_use is None else self.in_use

    @property
    def adaptable(self) -> bool:
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the base's `__call__`."""
        return self.plain(*args, **kwargs)

    def attend(self, x: jax.Array) -> jax.Array:
        """Same as the base's `attend`."""
        scores: jax.Array = self.plain.attend(x)
        return scores

    def folded(self) -> nnx.Module:
        copy: Any = nnx.clone(self.plain)
        kind = _weight_name(copy)
        setattr(copy, kind, nnx.Param(getattr(copy, kind)[...]))
        module: nnx.Module = copy
        return module


class TokenRows(nnx.Module):
    """Trained rows of an embedding: `rows` `[n, features]` float32, for the token ids `ids`."""

    def __init__(self, ids: tuple[int, ...], rows: jax.Array):
        self.ids = ids
        self.rows = nnx.LoRAParam(rows.astype(jnp.float32))


class TrainedTokens(SavedModule):
    """An embedding or an output head with some of its rows replaced by trained ones.

    As in PEFT, an output head tied to the embedding (`attend`) uses the trained rows too.
    """

    def add(self, name: str, ids: tuple[int, ...]) -> None:
        """Adds rows under that name, initialized from the base's own.

        Raises:
            LoraError: for an id that the base does not have.
        """
        self.adapters[name] = _token_rows(self.plain, ids)

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Embeddings `[..., features]` of token ids, or a head's scores `[..., rows]`."""
        base: Any = self.base
        y: jax.Array = base(x, **kwargs)
        trained = self.in_use
        if trained is None:
            return y
        if _weight_name(self.plain) == "kernel":
            return _with_scores(y, x, trained)
        match = x[..., None] == jnp.array(trained.ids)  # [..., n]
        rows = trained.rows[...].astype(y.dtype)[jnp.argmax(match, axis=-1)]
        return jnp.where(match.any(axis=-1)[..., None], rows, y)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of `x` `[..., features]` against every row."""
        base: Any = self.base
        scores: jax.Array = base.attend(x)
        trained = self.in_use
        return scores if trained is None else _with_scores(scores, x, trained)

    def folded(self) -> nnx.Module:
        return self.base if self.in_use is None else _with_rows(self.plain, self.in_use)


class TrainedHead(SavedModule):
    """The embedding of a tied head, when the head alone is trained: in full or some of its rows.

    It wraps what trains the embedding, if anything does. Its adapters are copies of the embedding,
    or `TokenRows`.
    """

    def add(self, name: str, ids: tuple[int, ...] | None = None) -> None:
        """Adds a copy, or rows, under that name.

        Raises:
            LoraError: for an id that the head does not have.
        """
        if ids is not None:
            self.adapters[name] = _token_rows(self.plain, ids)
            return
        copy = TrainedCopy(self.plain)
        copy.add(name)
        self.adapters[name] = copy.adapters[name]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `[..., features]` of token ids."""
        base: Any = self.base
        y: jax.Array = base(tokens)
        return y

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of `x` `[..., features]` against every row of the head."""
        module: Any = self.base if self.in_use is None else self.head
        scores: jax.Array = module.attend(x)
        return scores

    @property
    def adaptable(self) -> bool:
        return not isinstance(self.base, SavedModule) or self.base.adaptable

    def folded(self) -> nnx.Module:
        return self.base

    @property
    def head(self) -> nnx.Module:
        """An embedding with the head's weights."""
        trained = self.in_use
        if isinstance(trained, TokenRows):
            return _with_rows(self.plain, trained)
        copy = TrainedCopy(self.plain)
        copy.adapters, copy.active = nnx.Dict(head=trained), ("head",)
        return copy.folded()


class UntiedEmbedding(nnx.Module):
    """An embedding and an output head that were tied, with weights of their own."""

    def __init__(self, embedding: nnx.Module, head: nnx.Module):
        self.embedding = embedding
        self.head = head

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `[..., features]` of token ids."""
        module: Any = self.embedding
        y: jax.Array = module(tokens)
        return y

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of `x` `[..., features]` against every row of the head."""
        module: Any = self.head
        scores: jax.Array = module.attend(x)
        return scores


def _weight_name(module: nnx.Module) -> str:
    return next(name for name in _WEIGHTS if hasattr(module, name))


def _table(module: Any) -> jax.Array:
    """The weight of an embedding or a head as `[rows, features]`."""
    name = _weight_name(module)
    weight: jax.Array = getattr(module, name)[...]
    return weight if name == "embedding" else weight.T


def _token_rows(plain: nnx.Module, ids: tuple[int, ...]) -> TokenRows:
    table = _table(plain)
    beyond = [i for i in ids if i >= table.shape[0]]
    if beyond:
        raise LoraError(
            f"trainable_token_indices {beyond}: the embedding has {table.shape[0]} rows"
        )
    return TokenRows(ids, table[jnp.array(ids)])


def _with_scores(scores: jax.Array, x: jax.Array, trained: TokenRows) -> jax.Array:
    new = x @ trained.rows[...].astype(x.dtype).T
    return scores.at[..., jnp.array(trained.ids)].set(new.astype(scores.dtype))


def _with_rows(module: nnx.Module, trained: TokenRows) -> nnx.Module:
    """A copy of the module with the trained rows."""
    copy = nnx.clone(module)
    table = _table(copy)
    table = table.at[jnp.array(trained.ids)].set(trained.rows[...].astype(table.dtype))
    name = _weight_name(copy)
    getattr(copy, name).set_value(table if name == "embedding" else table.T)
    return copy
