"""What benchmarks of a step share: the quickstart model, dense rows, timing in turn."""

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

VOCAB = 40000  # token ids below it, which every tokenizer in use here has


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step with what it is called on."""

    program: Any
    state: TrainState
    rest: tuple[Any, ...]

    @property
    def buffers(self) -> float:
        """GiB of its temporary buffers."""
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
    """The options of a benchmark of one step."""
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=rounds)


def dense_batch(rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of random tokens without padding, `[1, B, S]`, all but the first of a row targets."""
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
    """The step of a wrapped model, with AdamW."""
    graphdef, trainable, frozen = partition(model)
    tx = optax.adamw(2e-4)
    state = TrainState(trainable, tx.init(trainable))
    rest = (frozen, batch, jnp.int32(0), jnp.uint32(0))
    return Step(jit_train_step(graphdef, tx, remat).lower(state, *rest).compile(), state, rest)


def timed_in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round: what a machine does besides falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step.run())
    return times
