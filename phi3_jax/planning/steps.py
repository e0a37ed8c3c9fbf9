"""The training step of a planned run or sweep, shapes and dtypes only."""

from __future__ import annotations

import abc
import copy
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_flax
from phi3_jax.config.loader import RunConfig
from phi3_jax.config.run import MAX_STEPS
from phi3_jax.evaluation.loss import LossSettings
from phi3_jax.model.network import Phi3
from phi3_jax.model.remat import Remat
from phi3_jax.planning.adapter import ensemble_of, with_adapter
from phi3_jax.sharding.mesh import MEMBER, batch_sharding
from phi3_jax.sharding.rules import state_shardings
from phi3_jax.training.optimizer import make_optimizer
from phi3_jax.training.step import TrainState, jit_train_step, partition, train_state_shardings
from phi3_jax.training.sweep.groups import members_per_device
from phi3_jax.training.sweep.step import (
    jit_sweep_step,
    stacked_shardings,
    stacked_state_shardings,
)

T = TypeVar("T")


class Step(abc.ABC):
    """A training step to be compiled.

    Attributes:
        members: adapters that a step of the run trains.
        each: of these, how many a device, or those that share a model, trains.
        together: of these, how many the program trains at once.
    """

    members: int = 1
    each: int = 1
    together: int = 1

    @property
    def times(self) -> int:
        """How often the program runs in one step of the run."""
        return -(-self.each // self.together)

    @abc.abstractmethod
    def arrays(self) -> tuple[TrainState, tuple[Any, ...]]:
        """What trains with its optimizer, and the other arrays that stay on the devices."""

    @abc.abstractmethod
    def shardings(self, mesh: Mesh) -> tuple[TrainState, tuple[Any, ...]]:
        """Where these arrays are."""

    @abc.abstractmethod
    def jit(
        self, remat: Remat, loss: LossSettings, shardings: TrainState | None = None
    ) -> jax.stages.Wrapped:
        """The step as a run compiles it."""

    @abc.abstractmethod
    def inputs(self, mesh: Mesh, shape: tuple[int, int, int]) -> list[Any]:
        """Its arguments after the arrays, for batches `[A, B, S]`."""

    def on_one_device(self) -> Step:
        """The part of a single device, or of those that share a model."""
        return self

    def placed(self, mesh: Mesh) -> tuple[TrainState, tuple[Any, ...]]:
        """The arrays with their shardings."""
        placed: tuple[TrainState, tuple[Any, ...]] = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.arrays(),
            self.shardings(mesh),
        )
        return placed


class RunStep(Step):
    """The step of a single run, whose model has its adapter."""

    def __init__(self, config: RunConfig, model: Phi3):
        self.graphdef, self.trainable, self.frozen = partition(model)
        self.tx = make_optimizer(config.training, MAX_STEPS, model)  # any schedule fits

    def arrays(self) -> tuple[TrainState, tuple[Any, ...]]:
        state = TrainState(self.trainable, jax.eval_shape(self.tx.init, self.trainable))
        return state, (self.frozen,)

    def shardings(self, mesh: Mesh) -> tuple[TrainState, tuple[Any, ...]]:
        state = train_state_shardings(self.tx, self.trainable, mesh)
        return state, (state_shardings(self.frozen, mesh),)

    def jit(
        self, remat: Remat, loss: LossSettings, shardings: TrainState | None = None
    ) -> jax.stages.Wrapped:
        return jit_train_step(self.graphdef, self.tx, remat, loss, shardings)

    def inputs(self, mesh: Mesh, shape: tuple[int, int, int]) -> list[Any]:
        return [_batch(shape, mesh), _whole((), jnp.int32, mesh), _whole((), jnp.uint32, mesh)]


class SweepStep(Step):
    """The step of a sweep's members, as many as take it together.

    Attributes:
        graphdef: of the model with one adapter.
        tx: the optimizer.
        trainable, constants: arrays of one member.
        frozen: the base.
        groups: devices, or groups of devices, that the members are spread over.
        own_rows: whether each member of a group has a batch of its own.
    """

    def __init__(
        self, config: RunConfig, base: Phi3, lora: lora_flax.LoraConfig, mesh: Mesh, tokens: int
    ):
        """The step of a config's members.

        Args:
            config: with lists in `sweep`.
            base: the model without an adapter; it is left unchanged.
            lora: an adapter with the members' largest rank.
            mesh: with an axis for members.
            tokens: of one member's micro-batch.
        """
        self.graphdef, self.trainable, self.constants, self.frozen = ensemble_of(base, lora)
        unit = config.training.model_copy(update={"learning_rate": 1.0})
        self.tx = make_optimizer(unit, MAX_STEPS, with_adapter(base, lora))
        self.members, self.groups = config.sweep.count, mesh.shape[MEMBER]
        platform = mesh.devices.flat[0].platform
        self.together = members_per_device(self.members, self.groups, tokens, platform)
        self.each = -(-self.members // self.groups)
        self.own_rows = self.together * self.groups > 1 and len(config.sweep.seed) > 1

    def arrays(self) -> tuple[TrainState, tuple[Any, ...]]:
        trainable, constants = _stack((self.trainable, self.constants), self.each * self.groups)
        state = TrainState(trainable, jax.eval_shape(jax.vmap(self.tx.init), trainable))
        return state, (constants, self.frozen)

    def on_one_device(self) -> SweepStep:
        part = copy.copy(self)
        part.each, part.groups = self.together, 1
        return part

    def shardings(self, mesh: Mesh) -> tuple[TrainState, tuple[Any, ...]]:
        trainable, constants = _stack((self.trainable, self.constants), self.each * self.groups)
        state = stacked_state_shardings(self.tx, trainable, mesh)
        return state, (stacked_shardings(constants, mesh), state_shardings(self.frozen, mesh))

    def jit(
        self, remat: Remat, loss: LossSettings, shardings: TrainState | None = None
    ) -> jax.stages.Wrapped:
        return jit_sweep_step(self.graphdef, self.tx, remat, loss, shardings)

    def inputs(self, mesh: Mesh, shape: tuple[int, int, int]) -> list[Any]:
        count = self.together * self.groups
        batch = _batch(shape, mesh, count if self.own_rows else None)
        stack = self.each * self.groups
        members = None if count == stack else _whole((count,), jnp.int32, mesh)
        step = _whole((), jnp.int32, mesh)
        seeds, rates = (_whole((stack,), kind, mesh) for kind in (jnp.uint32, jnp.float32))
        return [batch, members, step, seeds, rates]


def _stack(tree: T, count: int) -> T:
    """The tree with a leading axis of that size on every leaf."""
    stacked: T = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree
    )
    return stacked


def _whole(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An array that every device holds."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _batch(
    shape: tuple[int, int, int], mesh: Mesh, members: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch `[A, B, S]` of that shape, with a leading axis if each member has its own."""
    names = {"tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32}
    kinds: dict[str, Any] = names | {"targets": jnp.bool_}
    sharding, sizes = batch_sharding(mesh, leading=1), tuple(shape)
    if members is not None:
        leading = MEMBER if MEMBER in mesh.shape else None
        sharding = NamedSharding(mesh, PartitionSpec(leading, *sharding.spec))
        sizes = (members, *shape)
    return {
        name: jax.ShapeDtypeStruct(sizes, kind, sharding=sharding) for name, kind in kinds.items()
    }
