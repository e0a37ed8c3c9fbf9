"""Fine-tune a Phi-3 model with LoRA and export a PEFT adapter."""

from __future__ import annotations

import argparse
import logging
import shlex

from phi3_jax.buckets import Outage, Unanswered
from phi3_jax.cli import exit_codes
from phi3_jax.cli.arguments import add_config
from phi3_jax.config.describe import describe_keys
from phi3_jax.config.loader import RunConfig, load_config
from phi3_jax.platform import keep_compiled, wait_for_chip
from phi3_jax.sharding import processes
from phi3_jax.sharding.meeting import PeerError
from phi3_jax.training.interrupt import Interrupted, pass_on_signals, report
from phi3_jax.training.loop import train
from phi3_jax.training.output import local_folder
from phi3_jax.training.progress import NonFiniteError
from phi3_jax.training.state_files import CHECKPOINTS, saved_steps
from phi3_jax.training.sweep.run import train_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "The keys of a config file:\n\n" + describe_keys()
    add_config(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in output_dir"
    )
    # An option of its own: with a value, `--resume` would swallow an override that follows it.
    parser.add_argument(
        "--resume=auto",
        dest="resume",
        action="store_const",
        const="auto",
        help="continue if there is a checkpoint, otherwise start: one command for a job that is "
        "started again; a damaged checkpoint is put aside for the one before it",
    )
    parser.add_argument(
        "--join-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for the other processes, and for a TPU that another program holds "
        "(default 300); once a minute a line says what is missing",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this process is one of several of the same run, as on a TPU pod; see docs/hosts.md",
    )


def run(args: argparse.Namespace) -> int:
    """Train and return the exit code."""
    # Orbax logs a traceback of every error that it raises, which becomes one line of our own.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    config = load_config(args.config, args.overrides)
    wait_for_chip(args.join_timeout, report)
    if not (args.distributed or processes.is_asked_for()):
        return _train(args, config)
    try:
        peers = processes.join(args.join_timeout, report)
    except PeerError as error:
        report(f"phi3-jax train: {error}")
        return exit_codes.PEER_LOST
    pass_on_signals()
    with peers.together(exit_codes.PEER_LOST):
        return _train(args, config)


def _train(args: argparse.Namespace, config: RunConfig) -> int:
    keep_compiled()
    try:
        start = train_sweep if config.sweep.values else train
        start(config, resume=args.resume, command=_command(args))
    except NonFiniteError as error:
        report(f"phi3-jax train: {error}")
        return exit_codes.NON_FINITE
    except Unanswered as error:
        # The bucket of a model or data set that a resumed run has read before may come back.
        if not isinstance(error, Outage) and not (args.resume == "auto" and _steps(config)):
            raise
        report(f"phi3-jax train: {error}")
        return exit_codes.OUTAGE
    except Interrupted as stop:
        report(f"phi3-jax train: {stop}")
        return exit_codes.SIGNAL + stop.signum
    except KeyboardInterrupt as error:
        error.add_note(_kept(config))
        raise
    return exit_codes.OK


def _command(args: argparse.Namespace) -> str:
    """The command line, in the shortest form that says the same."""
    resume = {False: [], True: ["--resume"], "auto": ["--resume=auto"]}[args.resume]
    distributed = ["--distributed"] if args.distributed else []
    words = ["phi3-jax", "train", "--config", args.config, *resume, *distributed, *args.overrides]
    return shlex.join(words)


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"from 1 to 1000000 seconds, not {text}")
    return value


def _steps(config: RunConfig) -> list[int]:
    """The steps that were saved, as far as this machine knows."""
    return saved_steps(local_folder(config.training.output_dir) / CHECKPOINTS)


def _kept(config: RunConfig) -> str:
    """What is left of a run that ended at once."""
    if not (steps := _steps(config)):
        return "; no checkpoint had been saved"
    return f"; the checkpoint of step {steps[-1]} is kept, and --resume continues from it"
