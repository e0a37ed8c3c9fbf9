"""Shared by the step benchmarks: the quickstart's model, dense rows, alternating timing."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import quickstart
from phi3_jax.training.step import TrainState, jit_train_step, partition

VOCAB = 40000  # upper bound of the random token ids, below every vocabulary size used here


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step and its arguments."""

    program: Any
    state: TrainState
    rest: tuple[Any, ...]

    @property
    def buffers(self) -> float:
        """Size of its temporary buffers, GiB."""
        return self.program.memory_analysis().temp_size_in_bytes / 2**30

    def run(self) -> float:
        """Seconds of one step."""
        own = jax.tree.map(jnp.copy, self.state)  # the step donates it
        started = time.perf_counter()
        jax.block_until_ready(self.program(own, *self.rest))
        return time.perf_counter() - started


def quickstart_model(quantization: lora_flax.BitsAndBytesConfig | None = None) -> phi3_jax.Phi3:
    """The quickstart's base model in float32."""
    path = quickstart.resolve("quickstart://smollm2-135m-instruct")
    return phi3_jax.load(path, quantization=quantization)


def wrap_all_linear(model: phi3_jax.Phi3) -> None:
    """LoRA r=16 on all linear layers."""
    config = lora_flax.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))


def add_shape(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options for the shape of a step."""
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=rounds)


def dense_batch(rows: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens `[1, B, S]` without padding; all but the first of each row are targets."""
    shape = (1, rows, length)
    targets = np.ones(shape, bool)
    targets[..., 0] = False
    return {
        "tokens": np.random.default_rng(0).integers(0, VOCAB, shape, dtype=np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "targets": targets,
    }


def compile_step(model: phi3_jax.Phi3, batch: dict[str, np.ndarray], remat: str = "full") -> Step:
    """Compile a training step of a wrapped model, with AdamW."""
    graphdef, trainable, frozen = partition(model)
    tx = optax.adamw(2e-4)
    state = TrainState(trainable, tx.init(trainable))
    rest = (frozen, batch, jnp.int32(0), jnp.uint32(0))
    return Step(jit_train_step(graphdef, tx, remat).lower(state, *rest).compile(), state, rest)


def timed_in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds per step and round; alternating spreads the machine's other load over all steps."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step.run())
    return times
