"""The `phi3-jax` command: one subcommand per task, each in its own module.

A command's module is imported only when that command runs, so that `phi3-jax --help` does not wait
for JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

from phi3_jax.cli import exit_codes
from phi3_jax.errors import printable
from phi3_jax.no_torch import without_torch
from phi3_jax.training.interrupt import (
    Signals,
    Stopped,
    drop_closed_output,
    handle_signals,
    report,
)

# Command, module, and the line that `phi3-jax --help` prints. Every module has `add_arguments` and
# `run`, except `lm_eval`, which passes its arguments on to the harness.
COMMANDS = {
    "init": ("init", "write a config with comments that you can edit"),
    "configs": ("configs", "list the configs that ship with the package"),
    "suggest": ("suggest", "advise on a run's settings, and find its learning rate"),
    "convert-config": ("convert_config", "convert a config of TRL, LLaMA-Factory or Axolotl"),
    "train": ("train", "fine-tune a model and export a PEFT adapter"),
    "preview": ("preview", "show the rows of a run as the model will see them"),
    "generate": ("generate", "answer prompts"),
    "chat": ("chat", "chat with a model in the terminal"),
    "evaluate": ("evaluate", "compare held-out loss and answers with and without the adapter"),
    "lm-eval": ("lm_eval", "run EleutherAI's lm-evaluation-harness, with its own arguments"),
    "export": ("export", "write a run or adapter for PEFT, transformers or llama.cpp"),
    "merge": ("merge", "merge an adapter into its base model and save the result"),
    "push": ("push", "upload an adapter or a merged model to the Hugging Face hub"),
    "report": ("report", "write a run's report as a web page, or compare runs"),
    "plan": ("plan", "compile a run for hardware you do not have, and report what it needs"),
}


# How libtpu is told that there is no TPU to find or to share.
NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors quote arguments without their control characters."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with code 2."""
        super().error(printable(message))


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit code, one of `phi3_jax.cli.exit_codes`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    name = next((word for word in argv[:1] if word in COMMANDS), "")
    # Before anything is imported that takes long. In a chat, Ctrl-C only ends an answer.
    with plain_warnings(), handle_signals(name, interactive=name == "chat") as signals:
        try:
            code = _run(argv, signals)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # such as `phi3-jax configs | head -1`
            drop_closed_output()
            return exit_codes.SIGNAL + signal.SIGPIPE
        except KeyboardInterrupt as error:
            signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
            note = getattr(error, "__notes__", [""])[0]
        except Exception:
            # A library may turn the exception of a signal into one of its own.
            if signals.stopped is None:
                raise
            signum, note = signals.stopped, ""
    report(f"phi3-jax {name}: stopped by {signal.Signals(signum).name}{note}")
    return exit_codes.SIGNAL + signum


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """While inside, a warning is one line without the source that gave it."""
    former = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = former


def _run(argv: list[str], signals: Signals) -> int:
    # Only the command's own module is imported, so a first pass parses just its name.
    name = _parser().parse_args(argv[:1]).command
    # Otherwise transformers warns at every start that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Its own handler prints its warnings; the root logger, which Orbax gives one, would too.
    logging.getLogger("huggingface_hub").propagate = False
    from phi3_jax.errors import UserError, machine_problem, storage_problem

    asked = "TPU_SKIP_MDS_QUERY" in os.environ
    try:
        from lora_flax import LoraError
    except ValueError as error:  # JAX, which this imports, reads its settings from the environment
        report(f"phi3-jax {name}: {str(error).splitlines()[0]}; correct the environment variable")
        return exit_codes.BAD_INPUT
    if not asked and "TPU_SKIP_MDS_QUERY" in os.environ:
        # JAX found no TPU. If libtpu is installed, for `plan`, it would print that it misses the
        # first two, and let one process at a time load it.
        for variable, value in NO_TPU.items():
            os.environ.setdefault(variable, value)
    try:
        # Inside the try: importing a command whose extra is not installed raises UserError.
        # The harness is the one command that computes with torch.
        with contextlib.nullcontext() if name == "lm-eval" else without_torch():
            command = importlib.import_module(f"phi3_jax.cli.{COMMANDS[name][0]}")
        if name == "lm-eval":
            return int(command.run(argv[1:]))
        parser = Parser(prog=f"phi3-jax {name}", description=command.__doc__)
        command.add_arguments(parser)
        # Options may stand between overrides or prompts. `--`, after which everything is a prompt
        # or override, is not known to parse_intermixed_args.
        parse = parser.parse_args if "--" in argv else parser.parse_intermixed_args
        return int(command.run(parse(argv[1:])))
    except Exception as error:
        known: str | None
        if isinstance(error, UserError | LoraError):
            known = str(error)
        else:
            known = storage_problem(error) if isinstance(error, OSError) else machine_problem(error)
        if known is None or signals.stopped is not None:
            raise
        report(f"phi3-jax {name}: {known}")
        return exit_codes.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items()]
    parser = Parser(
        prog="phi3-jax",
        usage="phi3-jax COMMAND [ARGUMENT ...]",
        description="LoRA fine-tuning of the Phi-3 family in JAX.",
        epilog="\n".join(["commands:", *lines, "", "`phi3-jax COMMAND --help` has the details."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
