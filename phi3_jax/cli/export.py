"""Turn a run, an adapter or a model into files for other programs, and check them."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.checkpoint.adapters import named_model, open_with_adapter, require_adapter
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.checkpoint.layerwise import Layerwise
from phi3_jax.checkpoint.readers import rope_note_beside
from phi3_jax.cli.arguments import local_path, positive_gigabytes
from phi3_jax.cli.session import say
from phi3_jax.data.tokenizer import load_tokenizer, tokenizer_folder
from phi3_jax.errors import UserError
from phi3_jax.export.folders import merged_card, write_merged, write_peft
from phi3_jax.generation.answers import stop_ids
from phi3_jax.platform import keep_compiled
from phi3_jax.training.output import base_name
from phi3_jax.training.restore import write_checkpoint_adapter

FORMATS = {
    "peft": "a PEFT adapter",
    "unfused": "a PEFT adapter, with q_proj, k_proj, v_proj, gate_proj and up_proj",
    "merged": "a model folder for transformers, with the adapter merged in",
    "gguf": "a .gguf file for llama.cpp, with the adapter merged in",
    "gguf-adapter": "a .gguf file of the adapter alone",
}
PLAIN = ("float32", "float16", "bfloat16")
QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# The default of --dtype.
AUTO = {"gguf-adapter": "float32", "merged": "bfloat16", "gguf": "bfloat16"}


@dataclass(frozen=True)
class Source:
    """What is exported: a base model, the name to call it by, and the adapter's folder, if any.

    `keep_rslora` is that of the run that the adapter is from.
    """

    base: Checkpoint
    base_name: str
    adapter: Path | None
    name: str
    keep_rslora: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats:\n" + "\n".join(f"  {k:<13} {v}" for k, v in FORMATS.items())
    parser.add_argument("--run", type=local_path, metavar="DIR", help="a run's output_dir")
    parser.add_argument(
        "--step",
        default="last",
        metavar="N|best|last",
        help="the run's checkpoint: a step, the one with the lowest held-out loss, or the last one",
    )
    parser.add_argument("--adapter", help="folder or hub id of a PEFT adapter")
    parser.add_argument(
        "--model", help="folder or hub id of the base model; by default the one the adapter names"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *PLAIN, *QUANTIZED],
        help="dtype of the weights; auto is bfloat16, and float32 for adapters. The q types are "
        "for --format gguf",
    )
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add `--output` and `--max-shard-size`."""
    parser.add_argument(
        "--output", type=local_path, required=True, help="folder, or .gguf file, to write to"
    )
    parser.add_argument(
        "--max-shard-size",
        type=positive_gigabytes,
        default=5 * 10**9,
        metavar="GB",
        help="maximum size of one file of a merged model (default 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, check, and say what was compared."""
    _check(args)
    keep_compiled()
    with _source(args) as source:
        export(source, args.format, args.dtype, args.output, args.max_shard_size)
    return 0


def export(source: Source, form: str, dtype: str, output: Path, max_shard_size: int) -> None:
    """Write one format and print what was compared.

    Args:
        source: what to export.
        form: a key of `FORMATS`.
        dtype: `auto` or a dtype that the format has.
        output: where to write.
        max_shard_size: maximum bytes per file of a merged model.

    Raises:
        UserError, lora_flax.LoraError: the format cannot express the source.
    """
    kind = AUTO.get(form, "float32") if dtype == "auto" else dtype
    adapter = source.adapter
    if adapter is None and form in ("peft", "unfused", "gguf-adapter"):
        raise UserError(f"--format {form} needs --adapter or --run")
    note = None if adapter is None else rope_note_beside(adapter)
    card = merged_card(source.base_name, source.name if adapter else None, kind, note)
    # A GGUF file is rounded when it is written.
    stream = Layerwise.open(source.base, adapter, kind if form == "merged" else "float32")
    if form == "gguf-adapter":
        from phi3_jax.export.gguf_adapter import write_adapter

        done = str(write_adapter(stream, output, kind, source.name))
    elif form == "gguf":
        done = _gguf(stream, source, output, kind)
    elif form == "merged":
        done = write_merged(stream, source.base, output, max_shard_size, card, adapter)
    else:
        assert adapter is not None
        done = write_peft(
            stream,
            source.base,
            adapter,
            output,
            source.base_name,
            unfused=form == "unfused",
            keep_rslora=source.keep_rslora,
            card=card,
        )
    print(f"{FORMATS[form].split(',')[0]}: {output}\n{done}")
    if note is not None:
        print(note)
    if form == "gguf" and kind in PLAIN:
        print(f"other types: llama-quantize {output} {output.with_suffix('')}-Q4_K_M.gguf Q4_K_M")


def _gguf(stream: Layerwise, source: Source, output: Path, kind: str) -> str:
    from phi3_jax.export.gguf_model import write_model

    directory = source.base.directory
    tokenizer = load_tokenizer(tokenizer_folder(directory, source.adapter))
    stops = stop_ids(directory, tokenizer)
    return str(write_model(stream, tokenizer, stops, output, kind, source.name, say))


def _check(args: argparse.Namespace) -> None:
    """Refuse combinations of arguments that mean nothing."""
    problems = []
    if args.run is not None and (args.adapter or args.model):
        problems.append("--run has its own base model and adapter: leave out --model and --adapter")
    if args.run is None and not (args.adapter or args.model):
        problems.append("give --run, --adapter or --model")
    if args.run is None and args.step != "last":
        problems.append("--step chooses a checkpoint of --run")
    if args.step not in ("best", "last") and not args.step.isdecimal():
        problems.append(f"--step {args.step} is not a number of steps, best or last")
    if args.dtype in QUANTIZED and args.format != "gguf":
        problems.append(f"--dtype {args.dtype} is for --format gguf")
    if args.dtype not in ("auto", "float32") and args.format in ("peft", "unfused"):
        problems.append(f"--format {args.format} is always float32")
    is_file = args.output.suffix == ".gguf"
    if args.format.startswith("gguf") != is_file or (is_file and args.output.is_dir()):
        wanted = "a .gguf file" if args.format.startswith("gguf") else "a folder"
        problems.append(f"--output: --format {args.format} writes {wanted}, not {args.output}")
    if problems:
        raise UserError("; ".join(problems))


@contextlib.contextmanager
def _source(args: argparse.Namespace) -> Iterator[Source]:
    """What the arguments name; an adapter made of a run's checkpoint is deleted at the end."""
    if args.run is None:
        yield named_source(args.model, args.adapter)
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        restored = write_checkpoint_adapter(args.run, args.step, adapter)
        print(f"{args.run}: step {restored.step}")
        name = f"{args.run.resolve().name}-step-{restored.step}"
        yield Source(restored.base, restored.base_name, adapter, name, restored.keep_rslora)


def named_source(model: str | None, adapter: str | None) -> Source:
    """The source that `--model` and `--adapter` name.

    Raises:
        UserError: one of them does not exist or is not what it should be.
    """
    if model is None:
        assert adapter is not None
        model, adapter = adapter, None
        require_adapter(model)
    base, folder = open_with_adapter(model, adapter)
    path = Path(adapter or model).expanduser()
    path = path.resolve() if path.is_dir() else path
    # A run's folder says more than the name that all adapters have in it.
    name = path.parent.name if path.name == "adapter" else path.name
    return Source(base, base_name(named_model(model).base), folder, name)
