"""Suggest learning rate, rank, batch and length for a run, with reasons, as a config.

The output is a config: the reasons are its comments, and its sweep compares learning rates. With
--find-lr, some rates are compared at once for a few steps, and the config has the best one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import lora_flax
from phi3_jax.advice.literature import rate_range, shown
from phi3_jax.cli import exit_codes
from phi3_jax.cli.arguments import add_config, local_path, positive
from phi3_jax.config.loader import RunConfig, load_config
from phi3_jax.config.yaml_text import dump_yaml
from phi3_jax.errors import UserError
from phi3_jax.planning.find_lr import STEPS, FoundRate, find_lr, own_batch, rates_around
from phi3_jax.planning.fit import fit, this_topology
from phi3_jax.planning.report import print_attempt
from phi3_jax.planning.suggest import Suggestion, read_facts, suggest
from phi3_jax.planning.topology import devices_of, make_cpu_devices
from phi3_jax.platform import keep_compiled
from phi3_jax.training.interrupt import Interrupted, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_config(parser)
    parser.add_argument("--output", type=local_path, metavar="FILE", help="by default, print it")
    parser.add_argument(
        "--topology", help="plan for this hardware instead, as in `phi3-jax plan`, e.g. v5e:2x4"
    )
    parser.add_argument(
        "--find-lr", action="store_true", help="compare learning rates by short runs, all at once"
    )
    parser.add_argument(
        "--rates",
        type=_rates,
        metavar="RATE,RATE,...",
        help="the rates to compare, such as 1e-4,3e-4,1e-3 (by default five around the usual one)",
    )
    parser.add_argument(
        "--steps", type=positive, default=STEPS, help=f"steps of each (default {STEPS})"
    )


def run(args: argparse.Namespace) -> int:
    """Print or write the config."""
    if args.output is not None and args.output.exists():
        raise UserError(f"{args.output} already exists; choose another --output")
    if args.topology is not None:
        make_cpu_devices(args.topology)
        devices_of(args.topology)  # before the data are read
    keep_compiled()
    config = load_config(args.config, args.overrides)
    if config.sweep.values:
        raise UserError("sweep: the config has a sweep of its own; suggest is for a single run")
    facts = read_facts(config)
    found = suggest(config, facts)
    overrides = [*args.overrides, *_changes(found)]
    config = load_config(args.config, overrides)
    say = functools.partial(print_attempt, console=Console(stderr=True))
    found.append(fit(config, facts.network, args.topology or this_topology(), say))
    overrides += found[-1].overrides
    lora = config.peft.to_lora()
    rates = args.rates or rates_around(rate_range(facts.network.hidden_size, lora).likely)
    lines = _reasons(found)
    if args.find_lr:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the config is what goes to stdout
                result = find_lr(args.config, overrides, rates, args.steps)
        except Interrupted as stop:
            report(f"phi3-jax suggest: stopped by {signal.Signals(stop.signum).name}")
            return exit_codes.SIGNAL + stop.signum
        lines += table(result)
        overrides.append(f"training.learning_rate={result.best}")
        config = load_config(args.config, overrides)
    else:
        try:
            config = load_config(args.config, [*overrides, *_sweep(config, rates)])
        except UserError as error:
            lines.append(f"no sweep: {error}")
            config = load_config(args.config, overrides)
    _write(args.output, _text(config, lines), lines)
    return 0


def _write(output: Path | None, text: str, lines: Sequence[str]) -> None:
    if output is None:
        print(text, end="")
        return
    try:
        lora_flax.write_atomically(output, text)
    except OSError as error:
        raise UserError(f"--output: {error}") from None
    print("\n".join(lines))
    print(f"wrote {output}; run `phi3-jax train --config {output}`")


def table(result: FoundRate) -> list[str]:
    """The rates that were compared, and what to do if the best one is the first or the last."""
    lines = [f"learning rates by held-out loss after {result.steps} steps:"]
    width = max(len(shown(rate)) for rate in result.losses)
    for rate, loss in result.losses.items():
        mark = "  best" if rate == result.best else ""
        text = f"{loss:.4f}{mark}"
        if rate in result.stopped:
            text = f"in the worse half after {result.stopped[rate]} steps"
        lines.append(f"  {shown(rate):<{width}}  {text}")
    if result.edge is not None:
        center = result.best * (10 if result.edge == "highest" else 0.1)
        further = ",".join(shown(rate) for rate in rates_around(center, 3))
        lines.append(
            f"the best is the {result.edge} of them, so a better one may be further out: "
            f"compare with --rates {further}"
        )
    return lines


def _changes(found: Sequence[Suggestion]) -> list[str]:
    return [override for one in found for override in one.overrides]


def _reasons(found: Sequence[Suggestion]) -> list[str]:
    marks = {True: "change", False: "keep"}
    return [f"{marks[bool(one.overrides)]}: {one.reason}" for one in found]


def _sweep(config: RunConfig, rates: Sequence[float]) -> list[str]:
    """What makes the run a comparison of these rates."""
    overrides = [
        f"sweep.learning_rate={[float(f'{rate:g}') for rate in rates]}",
        f"training.output_dir={config.training.output_dir.rstrip('/')}-rates",
    ]
    # A sweep exports the last step of each member and pushes nothing.
    for key in ("load_best_model_at_end", "push_to_hub"):
        if getattr(config.training, key):
            overrides.append(f"training.{key}=false")
    if config.training.hub_strategy != "end":
        overrides.append("training.hub_strategy=end")
    if (data := config.mesh.data or 1) > 1:
        own = own_batch(config, {"data": data}, len(rates))
        overrides += [f"{key}={value}" for key, value in own.items()]
    return overrides


def _text(config: RunConfig, lines: Sequence[str]) -> str:
    """The config as YAML, with what the file and the command line said, under comments."""
    comments = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        comments += textwrap.wrap(line, 98, subsequent_indent=indent) or [""]
    sections = {
        name: values for name, values in config.model_dump(exclude_unset=True).items() if values
    }
    return "".join(f"# {line}\n" for line in comments) + "\n" + dump_yaml(sections)


def _rates(text: str) -> list[float]:
    rates = sorted({float(part) for part in text.split(",")})
    if len(rates) < 2 or not all(0 < rate < 1e3 for rate in rates):
        raise argparse.ArgumentTypeError(f"at least two different rates above 0, not {text}")
    return rates
