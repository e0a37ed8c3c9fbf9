"""On a GPU: check the GPU kernels against XLA, and compare the speed of a step with PEFT's.

    pip install '.[test,cuda]'            with a CUDA build of torch
    python benchmarks/gpu.py check
    python benchmarks/gpu.py train [--rows 2] [--length 4096] [--remat full] [--nf4] [--rounds 2]

`check` compares cuDNN attention and the fused 4-bit matmul with XLA, in value and gradient, and
times both. `train` runs LoRA steps of a model with Phi-3-mini's shape (random weights, bfloat16,
r=16 on all linear layers, AdamW, dense rows), each side in its own processes, in turn. PEFT uses
torch's flash attention, and checkpoints its layers if --remat is `full`. It prints tokens/s, peak
memory, and matmul utilization: the FLOP/s of the step's matmuls over the best rate of a large
bfloat16 matmul on the same device. Recomputed matmuls are not counted, so remat lowers it.

`train --layers 2 --hidden-size 256 --length 128` is a trial run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np
from sides import run_in_turn

SIDES = ("phi3_jax", "peft")
VOCAB = 32064


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("check").set_defaults(run=check)
    train = commands.add_parser("train")
    train.add_argument("--rows", type=int, default=2)
    train.add_argument("--length", type=int, default=4096)
    train.add_argument("--layers", type=int, default=32)
    train.add_argument("--hidden-size", type=int, default=3072)
    train.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    train.add_argument("--nf4", action="store_true", help="NF4 weights on both sides")
    train.add_argument("--steps", type=int, default=5)
    train.add_argument("--rounds", type=int, default=2)
    train.add_argument("--side", choices=SIDES, help="run one side and print JSON")
    train.set_defaults(run=compare)
    return parser.parse_args()


def shape(args: argparse.Namespace) -> dict:
    """Phi-3-mini's config.json, with the size given on the command line."""
    heads = max(1, args.hidden_size // 96)
    return {
        "model_type": "phi3",
        "vocab_size": VOCAB,
        "hidden_size": args.hidden_size,
        "head_dim": 96,
        "intermediate_size": args.hidden_size * 8 // 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 131072,
        "sliding_window": None,
        "pad_token_id": 0,
    }


def phi3_jax_step(args: argparse.Namespace):
    """A function that runs one step, and one that reports on it afterwards."""
    import jax
    import jax.numpy as jnp
    import optax
    from dense import compile_step, dense_batch, wrap_all_linear
    from flax import nnx

    import lora_flax
    from phi3_jax import Phi3, Phi3Config
    from phi3_jax.evaluation.loss import LossSettings, chunk_count
    from phi3_jax.planning.costs import matmul_flops
    from phi3_jax.training.step import jit_train_step, partition

    on_gpu = jax.default_backend() == "gpu"
    model = Phi3(Phi3Config.from_hf(shape(args)), rngs=nnx.Rngs(0), dtype="bfloat16")
    if args.nf4:
        lora_flax.quantize(
            model,
            lora_flax.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
        )
        if on_gpu:
            rows = args.rows * args.length
            print(lora_flax.choose_matmul(model, "gpu", rows, jnp.bfloat16, backward=True))
    if on_gpu:
        model.set_attn_implementation("cudnn")
    wrap_all_linear(model)
    batch = {name: array % VOCAB if name == "tokens" else array
             for name, array in dense_batch(args.rows, args.length).items()}  # fmt: skip
    step = compile_step(model, batch, args.remat)
    held = [step.state]
    plain = jit_train_step(partition(model)[0], optax.adamw(2e-4), "none")
    trips = chunk_count(args.rows, args.length, VOCAB, LossSettings())
    flops = matmul_flops(plain.trace(step.state, *step.rest).jaxpr, trips)

    def take() -> None:
        held[0], metrics = step.program(held[0], *step.rest)
        jax.block_until_ready(metrics)

    def known() -> dict:
        # The allocator's own peak would include creating the random weights.
        taken = step.program.memory_analysis()
        return {
            "peak": (taken.argument_size_in_bytes + taken.temp_size_in_bytes) / 2**30,
            "flops": flops,
            "rate": matmul_rate(),
            "device": jax.devices()[0].device_kind,
        }

    return take, known


def matmul_rate() -> float:
    """FLOP/s of an 8192 x 8192 bfloat16 matmul (1024 on a CPU), best of ten."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    return 2 * size**3 / min(_seconds(product, x) for _ in range(10))


def _seconds(run, *args) -> float:
    import jax

    started = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - started


def peft_step(args: argparse.Namespace):
    """The same with PEFT, as Trainer runs it, on torch's flash attention without a mask."""
    import peft
    import torch
    import transformers
    from dense import dense_batch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.Phi3Config(**shape(args), attn_implementation="sdpa")
    base = transformers.Phi3ForCausalLM(config).to(torch.bfloat16)
    if args.nf4:
        _quantize_linears(base)
    base = base.to(device)
    if args.remat == "full":
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    rows = dense_batch(args.rows, args.length)["tokens"][0] % VOCAB
    tokens = torch.from_numpy(np.array(rows)).long().to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # count the steps only, as on the other side

    def take() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    def known() -> dict:
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return {"peak": peak / 2**30}

    return take, known


def _quantize_linears(model) -> None:
    """Replace all linear layers except the head by bitsandbytes' NF4 layers."""
    import bitsandbytes as bnb
    import torch

    linears = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    for name, linear in linears:
        new = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        new.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, new)


def run_side(args: argparse.Namespace) -> dict:
    """Median seconds per step, and what the side reports."""
    take, known = {"phi3_jax": phi3_jax_step, "peft": peft_step}[args.side](args)
    for _ in range(2):
        take()
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        take()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds)} | known()


def compare(args: argparse.Namespace) -> None:
    """Run both sides in turn, each in its own processes, and print the table."""
    if args.side:
        print(json.dumps(run_side(args)))
        return
    runs = run_in_turn(SIDES, args.rounds)
    ours = runs["phi3_jax"][0]
    tokens = args.rows * args.length
    print(f"{ours['device']}: bfloat16 matmul {ours['rate'] / 1e12:.1f} TFLOP/s")
    print(f"{args.rows} x {args.length} tokens, remat {args.remat}\n")
    print("| side | step, s | tokens/s | peak, GiB | matmul utilization |")
    print("| --- | ---: | ---: | ---: | ---: |")
    best = {side: min(run["seconds"] for run in runs[side]) for side in SIDES}
    for side in SIDES:
        share = ours["flops"] / best[side] / ours["rate"]
        print(
            f"| {side} | {best[side]:.3f} | {tokens / best[side]:,.0f} | "
            f"{max(run['peak'] for run in runs[side]):.1f} | {share:.0%} |"
        )
    print(f"\nspeed of phi3_jax relative to PEFT: {best['peft'] / best['phi3_jax']:.2f}")


def check(args: argparse.Namespace) -> None:
    """Compare kernels with XLA: the largest difference relative to the largest value."""
    import jax

    if jax.default_backend() != "gpu":
        sys.exit("check needs a GPU; the comparisons that need none are in the tests")
    print("| operation | error, value | error, input gradient | ms | XLA, ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, kernel, plain, x in (*_attention_cases(), *_matmul_cases()):
        results, times = [], []
        for run in (kernel, plain):
            both = jax.jit(lambda x, run=run: _value_and_gradient(run, x))
            results.append(both(x))
            times.append(1e3 * min(_seconds(both, x) for _ in range(10)))
        apart = [_apart(a, b) for a, b in zip(*results, strict=True)]
        print(f"| {name} | {apart[0]:.1e} | {apart[1]:.1e} | {times[0]:.3f} | {times[1]:.3f} |")


def _value_and_gradient(run, x):
    import jax

    out, pull = jax.vjp(run, x)
    return out, pull(out)[0]


def _apart(a, b) -> float:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return float(np.abs(a - b).max() / np.abs(b).max())


def _attention_cases():
    """Self-attention with q = k = v, dense and packed, with and without a window."""
    import jax
    import jax.numpy as jnp

    from phi3_jax.model.attention import attention
    from phi3_jax.model.blockwise import Tokens

    length = 4096
    x = jax.random.normal(jax.random.key(0), (2, length, 32, 96), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    for kernel, segments in (
        ("cudnn", jnp.ones((2, length), jnp.int32)),
        ("cudnn_packed", positions // 700 + 1),
    ):
        start = (segments - 1) * 700
        tokens = Tokens(positions - start, segments, positions - start, segments)
        for window in (None, 500):

            def run(x, how, tokens=tokens, window=window):
                return attention(x, x, x, tokens, window, True, how)

            yield (
                f"{kernel}, window {window}",
                lambda x, run=run, kernel=kernel: run(x, kernel),
                lambda x, run=run: run(x, "xla"),
                x,
            )


def _matmul_cases():
    """Phi-3-mini's gate_up_proj, with rows from one decoded token up to a training step."""
    import jax
    import jax.numpy as jnp

    from lora_flax import QuantizedArray

    plain = 0.02 * jax.random.normal(jax.random.key(0), (3072, 16384))
    kernel = QuantizedArray.quantize(plain, "nf4", double=True)
    for rows in (1, 16, 256, 4096):
        x = jax.random.normal(jax.random.key(1), (rows, 3072), jnp.bfloat16)
        yield (
            f"NF4 matmul, {rows} rows",
            lambda x: kernel.matmul(x, "gpu"),
            lambda x: kernel.matmul(x),
            x,
        )


if __name__ == "__main__":
    parsed = parse_args()
    parsed.run(parsed)
