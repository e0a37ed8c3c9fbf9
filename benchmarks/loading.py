"""Speed and peak memory of loading a sharded checkpoint, compared with transformers, in turn.

    python benchmarks/loading.py [--layers 14] [--dtype bfloat16] [--rounds 3] [--nf4]

Writes a random bfloat16 checkpoint of about 2 GB in shards of 500 MB to a temporary folder, loads
it in a fresh process per side and round, and prints a table. Peak memory excludes what the process
held before loading (VmHWM minus VmRSS, so mapped file pages count). With --nf4 this project
quantizes while loading, with double quantization, and transformers is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("phi3_jax", "transformers")
MB = 1e6


def build(directory: Path, layers: int) -> None:
    """Write a random checkpoint, in a separate process so that its memory is not counted."""
    import jax.numpy as jnp
    from flax import nnx

    import phi3_jax

    config = phi3_jax.Phi3Config(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
    )
    model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    phi3_jax.save(model, directory, max_shard_size=500 * 10**6)


def memory(name: str) -> float:
    """A field of /proc/self/status, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise KeyError(name)


def load(side: str, directory: Path, dtype: str, nf4: bool) -> dict[str, float]:
    """Load once in this process; seconds and MB."""
    if side == "phi3_jax":
        import jax

        import phi3_jax
        from lora_flax import BitsAndBytesConfig

        jax.devices()
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
        before, start = memory("VmRSS"), time.perf_counter()
        model = phi3_jax.load(directory, dtype=dtype, quantization=four if nf4 else None)
        jax.block_until_ready(model.lm_head.kernel[...])
    else:
        import torch
        from transformers import AutoModelForCausalLM, Phi3ForCausalLM  # noqa: F401

        before, start = memory("VmRSS"), time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        # Its tensors are views of mapped files, read only when used: use them all.
        for parameter in model.parameters():
            parameter.sum()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": memory("VmHWM") - before, "held": memory("VmRSS") - before}


def main() -> None:
    """Build, load in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "build":
        return build(args.directory, args.layers)
    if args.side:
        print(json.dumps(load(args.side, args.directory, args.dtype, args.nf4)))
        return None
    with tempfile.TemporaryDirectory() as folder:

        def run(side: str) -> str:
            command = [sys.executable, __file__, "--side", side, "--directory", folder]
            command += ["--dtype", args.dtype, "--layers", str(args.layers)]
            command += ["--nf4"] if args.nf4 else []
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        run("build")
        files = list(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / MB
        scale = {"bfloat16": 1, "float32": 2}[args.dtype]
        largest = 2 * 2048 * 32064 / MB * scale
        print(f"checkpoint: {size:.0f} MB bfloat16 in {len(files)} files, loaded as {args.dtype}")
        print(f"target, model + 3 x its largest tensor: {size * scale + 3 * largest:.0f} MB\n")
        print("| side | MB/s of file, best | seconds | peak, MB | afterwards, MB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        sides = SIDES[:1] if args.nf4 else SIDES
        rounds = [{side: json.loads(run(side)) for side in sides} for _ in range(args.rounds)]
        for side in sides:
            seconds = sorted(r[side]["seconds"] for r in rounds)
            peak = max(r[side]["peak"] for r in rounds)
            held = max(r[side]["held"] for r in rounds)
            each = " ".join(f"{s:.1f}" for s in seconds)
            print(f"| {side} | {size / seconds[0]:.0f} | {each} | {peak:.0f} | {held:.0f} |")
    return None


if __name__ == "__main__":
    main()
