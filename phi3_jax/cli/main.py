"""The other commands: `phi3-jax generate`, `chat`, `evaluate`, `lm-eval`, `merge` and `plan`."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

import lora_flax
import phi3_jax
from phi3_jax.checkpoint.base import load_with_adapter
from phi3_jax.checkpoint.merged import merge_adapter, save_merged
from phi3_jax.config.loader import load_config
from phi3_jax.data.chat import load_tokenizer, render
from phi3_jax.errors import UserError
from phi3_jax.evaluation.metrics import evaluate, print_evaluation, write_evaluation
from phi3_jax.generation.answers import stop_ids
from phi3_jax.planning.costs import keep_compiled
from phi3_jax.planning.plan import largest, plan
from phi3_jax.planning.report import print_attempt, print_plan, read_model_config
from phi3_jax.planning.topology import make_cpu_devices
from phi3_jax.platform import compute_dtype, set_quantized_matmul

EXIT_BAD_INPUT = 2
HELP = "/reset starts a new chat, /base and /adapter switch the adapter off and on, /quit ends"


@dataclass
class Session:
    """A model with its tokenizer, ready to answer."""

    model: phi3_jax.Phi3
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    keep_compiled()
    try:
        if argv[:1] == ["lm-eval"]:
            # Its arguments are another program's.
            importlib.import_module("phi3_jax.evaluation.lm_eval").main(argv[1:])
            return 0
        args = _parser().parse_args(argv)
        args.run(args)
    except (UserError, lora_flax.LoraError) as error:
        print(f"phi3-jax: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phi3-jax", description="Use a Phi-3 model in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="answer prompts")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="user messages")
    generate.add_argument("--file", type=Path, help="a text file with one prompt a line")
    generate.add_argument(
        "--raw", action="store_true", help="continue the text itself, without the chat template"
    )
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", help=f"talk to the model in the terminal; {HELP}")
    chat.add_argument("--system", help="a system message")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        _add_model(command)
        _add_sampling(command)
    measure = commands.add_parser("evaluate", help="held-out loss and answers, base beside adapter")
    measure.add_argument("--config", required=True, metavar="FILE", help="of a run")
    measure.add_argument(
        "--adapter", help="folder or hub id; by default the run's own, output_dir/adapter"
    )
    measure.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    measure.add_argument("--max-questions", type=int, help="answer the first so many only")
    measure.add_argument("--output", type=Path, help="folder to write; by default output_dir")
    measure.add_argument("overrides", nargs="*", metavar="section.key=value")
    measure.set_defaults(run=_evaluate)
    merge = commands.add_parser("merge", help="fold an adapter into its base and save the model")
    _add_model(merge)
    merge.add_argument("--output", type=Path, required=True, help="folder to write")
    merge.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file (default 5)"
    )
    merge.set_defaults(run=_merge)
    _add_plan(commands.add_parser("plan", help="compile a run for a TPU that is not there"))
    commands.add_parser("lm-eval", help="run EleutherAI's lm-evaluation-harness (its arguments)")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub id of a Phi-3 checkpoint")
    parser.add_argument("--adapter", help="folder or hub id of a PEFT adapter")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto is float32 on CPU, else bfloat16 (merge: bfloat16)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="of a run")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4, v6e:2x2, cpu:8")
    parser.add_argument(
        "--model-config", type=Path, metavar="FILE", help="config.json; by default model.path's"
    )
    parser.add_argument(
        "--search", action="store_true", help="find the cheapest remat policy and largest batch"
    )
    parser.add_argument(
        "--quick", action="store_true", help="compile with little effort, for more memory"
    )
    parser.add_argument("--price", type=float, help="dollars a chip-hour, for tokens a dollar")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    make_cpu_devices(args.topology)
    config = load_config(args.config, args.overrides)
    model_config = read_model_config(args.model_config, config)
    console = Console()
    if args.search:
        say = functools.partial(print_attempt, console=console)
        found = largest(config, model_config, args.topology, say, args.quick)
        if found is None:
            raise UserError(f"{args.topology}: not even one row of {config.data.max_length} fits")
    else:
        found = plan(config, model_config, args.topology, quick=args.quick)
    print_plan(found, console, args.price)


def _sampling(args: argparse.Namespace) -> dict:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(args, name) for name in (*names, "max_new_tokens")}


def _load(args: argparse.Namespace, rows: int) -> Session:
    """Ready to answer so many prompts at once."""
    folder = phi3_jax.resolve(args.model)
    tokenizer = load_tokenizer(folder)
    adapter = phi3_jax.resolve(args.adapter) if args.adapter else None
    dtype = compute_dtype(args.dtype)
    model = load_with_adapter(folder, adapter, dtype)
    set_quantized_matmul(model, "auto", 1, rows, dtype)
    return Session(model, tokenizer, stop_ids(folder, tokenizer))


def _generate(args: argparse.Namespace) -> None:
    prompts = list(args.prompts)
    if args.file is not None:
        try:
            prompts += args.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file: {error}") from None
    if not prompts:
        raise UserError("give prompts, or --file with one a line")
    session = _load(args, len(prompts))
    ids = [_encode(session, [{"role": "user", "content": p}], args.raw) for p in prompts]
    answers = phi3_jax.generate(session.model, ids, eos_ids=session.stops, **_sampling(args))
    for answer in answers:
        print(str(session.tokenizer.decode(answer, skip_special_tokens=True)).strip())


def _chat(args: argparse.Namespace) -> None:
    session, console = _load(args, 1), Console(highlight=False)
    if not session.tokenizer.chat_template:
        raise UserError(f"{args.model} has no chat template; use `phi3-jax generate --raw`")
    start = [{"role": "system", "content": args.system}] if args.system else []
    history = list(start)
    console.print(HELP, style="dim")
    while True:
        try:
            text = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text in ("/reset", "/base", "/adapter"):
            _command(session, text, console)
            history = list(start) if text == "/reset" else history
            continue
        if not text:
            continue
        history.append({"role": "user", "content": text})
        console.print("[bold]model:[/bold] ", end="")
        answer = ""
        for piece in _pieces(session, _encode(session, history, raw=False), args):
            console.print(piece, end="", markup=False, soft_wrap=True)
            answer += piece
        console.print()
        history.append({"role": "assistant", "content": answer.strip()})


def _command(session: Session, text: str, console: Console) -> None:
    names = lora_flax.adapter_names(session.model)
    if text == "/reset":
        console.print("a new chat", style="dim")
    elif not names:
        console.print("there is no adapter", style="dim")
    else:
        lora_flax.set_adapter(session.model, [] if text == "/base" else names)
        console.print("the base answers" if text == "/base" else "with the adapter", style="dim")


def _pieces(session: Session, ids: list[int], args: argparse.Namespace) -> Iterator[str]:
    """Text as it comes. A token may be part of a character, so the whole is decoded each time."""
    tokens: list[int] = []
    shown = ""
    for token in phi3_jax.stream(session.model, ids, eos_ids=session.stops, **_sampling(args)):
        tokens.append(token)
        text = str(session.tokenizer.decode(tokens, skip_special_tokens=True))
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text


def _encode(session: Session, chat: list[dict[str, str]], raw: bool) -> list[int]:
    tokenizer = session.tokenizer
    if raw or not tokenizer.chat_template:
        return tokenizer(chat[-1]["content"])["input_ids"]
    text = render(chat, tokenizer, add_generation_prompt=True)
    # The template has written every special token that there is to be.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _evaluate(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    output = Path(config.training.output_dir).expanduser()
    adapter = args.adapter
    if adapter is None and (output / "adapter").is_dir():
        adapter = str(output / "adapter")
    result = evaluate(config, adapter, args.max_new_tokens, args.max_questions)
    write_evaluation(result, args.output or output)
    print_evaluation(result, Console())
    print(f"samples: {(args.output or output) / 'evaluation_samples.jsonl'}")


def _merge(args: argparse.Namespace) -> None:
    if not args.adapter:
        raise UserError("merge needs --adapter")
    folder = phi3_jax.resolve(args.model)
    dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    model = load_with_adapter(folder, phi3_jax.resolve(args.adapter), dtype)
    merge_adapter(model)
    save_merged(model, args.output, folder, int(args.max_shard_size * 10**9))
    print(f"merged model: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
