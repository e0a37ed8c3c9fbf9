"""Show the rows of a run as the model will see them, without reading the weights."""

from __future__ import annotations

import argparse

from rich.console import Console

import lora_flax
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.cli.arguments import add_config, local_path
from phi3_jax.config.loader import load_config
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.loading import load_data
from phi3_jax.data.preview import look
from phi3_jax.data.preview_html import to_html
from phi3_jax.data.preview_text import print_preview
from phi3_jax.data.tokenizer import tokenizer_of
from phi3_jax.errors import UserError
from phi3_jax.quickstart import local_paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_config(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--html", type=local_path, metavar="FILE", help="write a page instead")


def run(args: argparse.Namespace) -> int:
    """Tokenize the data and show it."""
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: at least 1 is needed")
    config = local_paths(load_config(args.config, args.overrides))
    base = resolve(config.model.path, config.model.revision, weights=False)
    continued, revision = config.peft.adapter_name_or_path, config.peft.adapter_revision
    adapter = None if continued is None else resolve(continued, revision, weights=False)
    tokenizer = tokenizer_of(base, adapter, config.data)
    # A preview is there to show what is wrong, all of it.
    data = config.data.model_copy(update={"on_bad_row": "skip"})
    train, test = load_data(data, tokenizer)
    # As on one device; a step of a run on several takes more rows of the same order.
    plan = BatchPlan.from_config(data, config.training)
    batches = plan.train_batches(train.examples, config.training.seed)
    title = ", ".join(source.path for source in config.data.data_sets)
    preview = look(train, test, batches, tokenizer, args.rows)
    if args.html is None:
        print_preview(preview, Console(highlight=False))
    else:
        try:
            lora_flax.write_atomically(args.html, to_html(preview, title))
        except OSError as error:
            raise UserError(f"--html {args.html}: {error.strerror}") from None
        print(f"preview: {args.html}")
    bad = train.report.skipped + (0 if test is None else test.report.skipped)
    if config.data.on_bad_row == "error" and bad:
        print(
            f"phi3-jax train would stop at the first of these {bad:,} rows; "
            "data.on_bad_row: skip leaves them out"
        )
    return 0
