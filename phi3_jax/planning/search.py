"""Search for the cheapest rematerialization policy and the largest batch that fit a topology."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from phi3_jax.config.loader import RunConfig
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.remat import Remat
from phi3_jax.planning.plan import Plan, plan
from phi3_jax.platform import host_memory
from phi3_jax.training.remat import LADDER

# Cheapest to compute first.
POLICIES: tuple[Remat, ...] = ("none", *LADDER)


def largest(
    config: RunConfig,
    model_config: Phi3Config,
    topology: str,
    say: Callable[[Plan], None] = lambda plan: None,
    quick: bool = False,
    profiled: bool = False,
) -> Plan | None:
    """Find the cheapest policy that fits, with the largest batch that fits under it.

    Every candidate is compiled. The batch size doubles until it no longer fits, then is bisected.

    Args:
        config, model_config, topology: as in `plan`.
        say: called with each plan tried.
        quick, profiled: as in `plan`.

    Returns:
        The plan, or None if not even one row per device fits.
    """

    def attempt(remat: Remat, rows: int) -> Plan | None:
        tried = plan(config, model_config, topology, remat, rows, quick, profiled)
        # The compiler for CPUs knows no limit; simulated devices share this machine's memory.
        if tried.chip is None and tried.peak * tried.chips > host_memory():
            tried = dataclasses.replace(tried, fits=False)
        say(tried)
        return tried if tried.fits else None

    for remat in POLICIES:
        best = attempt(remat, 1)
        if best is None:
            continue
        low, high = 1, 2
        while (found := attempt(remat, high)) is not None:
            best, low, high = found, high, 2 * high
        while high - low > max(1, low // 8):
            middle = (low + high) // 2
            found = attempt(remat, middle)
            best, low, high = (found, middle, high) if found else (best, low, middle)
        return best
    return None
