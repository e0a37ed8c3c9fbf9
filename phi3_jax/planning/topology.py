"""Hardware to plan for: TPU chip specifications, and abstract devices to compile for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.peaks import TPU_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specifications of one chip.

    From Google Cloud's pages on each TPU version; memory as reported by the compiler; the clock
    from the FLOP/s and the size of the matrix units.

    Attributes:
        memory: GiB.
        flops: bf16 FLOP/s.
        bandwidth, interconnect: HBM and interconnect, bytes/s.
        clock: cycles/s.
    """

    memory: float
    flops: float
    bandwidth: float
    interconnect: float
    clock: float


CHIPS = {
    "v4": Chip(31.75, TPU_FLOPS["v4"], 1228e9, 300e9, 1.05e9),
    "v5e": Chip(15.75, TPU_FLOPS["v5e"], 819e9, 200e9, 1.5e9),
    "v5p": Chip(95.0, TPU_FLOPS["v5p"], 2765e9, 600e9, 1.75e9),
    "v6e": Chip(31.25, TPU_FLOPS["v6e"], 1640e9, 448e9, 1.75e9),
}
_KNOWN = "v4:2x2x1, v5e:1x1, v5e:2x4, v5p:2x2x1, v6e:4x4, cpu:8"


def make_cpu_devices(topology: str) -> None:
    """For `cpu:8`, split this CPU into eight devices, if JAX has not been initialized yet."""
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        with contextlib.suppress(RuntimeError):  # already initialized: `devices_of` says how many
            jax.config.update("jax_num_cpu_devices", int(count))


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as `v5e:2x4` or `cpu:8`.

    Raises:
        UserError: the topology does not exist, or its compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape):
        if len(jax.devices("cpu")) < int(shape):
            raise UserError(
                f"{topology}: this process only has {len(jax.devices('cpu'))} CPU devices"
            )
        return jax.devices("cpu")[: int(shape)]
    if kind not in CHIPS or not shape:
        raise UserError(f"{topology!r} is not a valid topology; examples: {_KNOWN}")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    if shape in ("1x1", "1x1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # the plugin raises many types
        text = str(error).strip().splitlines()[0]
        if "lockfile" in text:
            raise UserError(
                f"{topology}: another process of this host has loaded the TPU compiler ({text}): "
                "wait for it, or plan on a machine without a TPU"
            ) from None
        if "libtpu" in text.lower() or "Unable to initialize" in text or "not found" in text:
            raise UserError(
                f"{topology}: the TPU compiler is not installed: "
                f"pip install 'phi3-jax[tpu]' ({text})"
            ) from None
        raise UserError(
            f"{topology!r} is not a valid topology ({text}); examples: {_KNOWN}"
        ) from None
    return list(found.devices)


def mean_hops(devices: Iterable[Any]) -> float:
    """Links between two chips of a slice on average, over all pairs and a chip and itself.

    Small slices have no links from one end to the other.
    """
    places = np.array([device.coords for device in devices])
    return float(np.abs(places[:, None] - places).sum(axis=-1).mean())
