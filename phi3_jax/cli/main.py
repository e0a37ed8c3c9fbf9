"""The `phi3-jax` command: one verb per task, each in a module of its own.

A command's module is imported only when that command runs, so that `phi3-jax --help` does not wait
for JAX.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from phi3_jax.cli import exit_codes

# Command, module, and the line that `phi3-jax --help` prints. Every module has `add_arguments` and
# `run`; `lm_eval` takes its arguments as they are, for they belong to another program.
COMMANDS = {
    "init": ("init", "write a shipped config to a file of your own"),
    "configs": ("configs", "list the configs that ship with the package"),
    "train": ("train", "fine-tune a model and export a PEFT adapter"),
    "generate": ("generate", "answer prompts"),
    "chat": ("chat", "talk to a model in the terminal"),
    "evaluate": ("evaluate", "held-out loss and answers, base beside adapter"),
    "lm-eval": ("lm_eval", "run EleutherAI's lm-evaluation-harness (its arguments)"),
    "merge": ("merge", "fold an adapter into its base and save the model"),
    "plan": ("plan", "compile a run for a device that is not present"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments, by default those of the process.

    Returns:
        The exit code, one of `phi3_jax.cli.exit_codes`.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Which command it is decides what is imported; a first pass stops at the command's name.
    name = _parser().parse_args(argv[:1]).command
    # transformers otherwise says at every start that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lora_flax import LoraError
    from phi3_jax.errors import UserError

    try:
        # Inside: a command whose extra is not installed says so when it is imported.
        command = importlib.import_module(f"phi3_jax.cli.{COMMANDS[name][0]}")
        if name == "lm-eval":
            return int(command.run(argv[1:]))
        parser = argparse.ArgumentParser(prog=f"phi3-jax {name}", description=command.__doc__)
        command.add_arguments(parser)
        return int(command.run(parser.parse_args(argv[1:])))
    except (UserError, LoraError) as error:
        print(f"phi3-jax {name}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        print(f"phi3-jax {name}: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
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
