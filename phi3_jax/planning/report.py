"""Input and output of `phi3-jax plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from phi3_jax.checkpoint.bitsandbytes import parse_quantization
from phi3_jax.checkpoint.hub import resolve_file
from phi3_jax.config.loader import RunConfig
from phi3_jax.config.sections import QuantizationConfig
from phi3_jax.errors import UserError
from phi3_jax.model.config import Phi3Config, read_json_object
from phi3_jax.model.remat import describe
from phi3_jax.planning.parts import PARTS, PHASES
from phi3_jax.planning.plan import Plan
from phi3_jax.quickstart import local_paths

GIB = 2**30


def read_base(file: Path | None, config: RunConfig) -> tuple[RunConfig, Phi3Config]:
    """Read the base model's config.json; no weights are read or downloaded.

    Args:
        file: the config.json; None for that of `model.path`.
        config: the run's config.

    Returns:
        The run's config, with names resolved as in a run and the quantization that a pre-quantized
        checkpoint was saved with, and the architecture.

    Raises:
        UserError: no such file or hub id, not a Phi-3 config, quantization settings that are not
            supported, or set both there and in the run's config.
    """
    if file is None or Path(config.model.path).expanduser().is_dir():
        config = local_paths(config)  # asks the hub about other names
    if file is None:
        file = resolve_file(config.model.path, "config.json", config.model.revision)
    raw = read_json_object(file)
    architecture = Phi3Config.from_hf(raw, file).with_rope_factors(config.model.rope_factors)
    if not (stored := raw.get("quantization_config")):
        return config, architecture
    if config.model.quantization is not None:
        raise UserError(f"{file}: already quantized; remove model.quantization")
    settings = dataclasses.asdict(parse_quantization(stored, file))
    quantization = QuantizationConfig.model_validate(settings, strict=False)  # a tuple is a list
    section = config.model.model_copy(update={"quantization": quantization})
    return config.model_copy(update={"model": section}), architecture


def print_attempt(plan: Plan, console: Console) -> None:
    """Print one line about a candidate plan."""
    result = f"{plan.peak / GIB:.2f} GiB" if plan.fits else "does not fit"
    console.print(f"remat {describe(plan.remat)}, {_work(plan)}: {result}")


def print_plan(plan: Plan, console: Console, price: float | None = None) -> None:
    """Print the full table; `price` is in dollars per chip-hour."""
    table = Table("", plan.topology)
    chip = plan.chip
    for name, size in (
        ("weights, GiB per chip", plan.weights),
        ("adapter, GiB per chip", plan.adapter),
        ("optimizer, GiB per chip", plan.optimizer),
    ):
        table.add_row(name, f"{size / GIB:.3f}")
    if plan.fits:
        table.add_row("activations and other, GiB per chip", f"{plan.activations / GIB:.3f}")
        of = f" of {chip.memory:.2f}" if chip else ""
        table.add_row("peak, GiB per chip", f"{plan.peak / GIB:.2f}{of}")
    if plan.host:
        table.add_row("host memory, GiB per chip", f"{plan.host / GIB:.2f}")
    tokens = plan.members * plan.rows * plan.length * plan.accumulation
    table.add_row("tokens per step", f"{tokens:,}")
    table.add_row("matmul TFLOPs per step", f"{plan.flops / 1e12:.1f}")
    table.add_row("matmul operands and results, GiB per chip", f"{plan.traffic / GIB:.1f}")
    share = plan.weight_traffic / plan.traffic
    table.add_row("of which stored weights", f"{share:.0%}")
    for kind, size in sorted(plan.collectives.items()):
        table.add_row(f"{kind}, GiB per chip and step", f"{size / GIB:.3f}")
    if plan.fits and plan.roofline():
        for name, seconds in plan.roofline().items():
            table.add_row(f"roofline: {name}", f"{seconds:.3f} s")
        seconds = max(plan.roofline().values())
        table.add_row("roofline: tokens/s", f"{tokens / seconds:,.0f}")
        if price is not None:
            per_second = price * plan.chips / 3600
            table.add_row("roofline: tokens per dollar", f"{tokens / seconds / per_second:,.0f}")
    table.add_row("compile time", f"{plan.compile_seconds:.0f} s")
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    console.print(f"mesh {axes}; {_work(plan)}; remat {describe(plan.remat)}")
    console.print(table)
    if plan.fits:
        console.print("It fits.")
    else:
        console.print(f"It does not fit: {plan.problem}\nUse --search to find what does.")


def _work(plan: Plan) -> str:
    """What a step trains on."""
    members = f"{plan.members} members, each " if plan.members > 1 else ""
    each = f"{plan.accumulation} x " if plan.accumulation > 1 else ""
    return f"{members}{each}{plan.rows} rows of {plan.length} tokens"


def print_profile(plan: Plan, console: Console) -> None:
    """Print the estimated cycles of each part, and what follows from them; nothing if unknown."""
    costs = plan.profile
    if costs is None:
        return
    table = Table("million cycles", *PHASES, "sum", "share", "ideal")
    sums, ideal = costs.by_part(costs.cycles), costs.by_part(costs.ideal)
    total = sum(sums.values())
    for part in [part for part in PARTS if sums.get(part)]:
        each = [_millions(costs.cycles.get((part, phase), 0.0)) for phase in PHASES]
        share = f"{sums[part] / total:.1%}"
        table.add_row(part, *each, _millions(sums[part]), share, _millions(ideal.get(part, 0.0)))
    whole = [
        _millions(sum(costs.cycles.get((part, phase), 0.0) for part in PARTS)) for phase in PHASES
    ]
    table.add_row("all", *whole, _millions(total), "100%", _millions(sum(ideal.values())))
    console.print(table)
    console.print(
        "Nothing ran. These are the cycles that the compiler expects on one chip, loops by their "
        "counts. Ideal: the matrix products at the chip's full rate."
    )
    if costs.kernels:
        console.print(
            f"The compiler gives no estimate for kernels: {_millions(costs.kernels)} of these "
            "million are their matrix products at full rate, or their operands at full bandwidth."
        )
    if costs.overlap.total:
        console.print(
            f"Collectives take {_millions(costs.overlap.total)} million cycles at the "
            f"interconnect's full rate, of which {costs.overlap.hidden:.0%} pass while other work "
            "is scheduled; the rest is in the step below."
        )
    roofline = max(plan.roofline().values())
    for name, seconds in (("roofline", roofline), ("compiler", costs.seconds_with_collectives)):
        use = costs.utilization(seconds)
        console.print(f"{name}: {seconds:.3f} s a step, model FLOPs utilization {use:.1%}")


def _millions(cycles: float) -> str:
    return f"{cycles / 1e6:,.2f}" if cycles else ""
