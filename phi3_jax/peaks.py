"""The peak speed of known devices, in dense 16-bit FLOP/s: what utilization is a share of."""

from __future__ import annotations

# By TPU version, from Google Cloud's page on each.
TPU_FLOPS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
# By words of the device kind that JAX reports, the more particular first: bfloat16 with float32
# sums, without sparsity, from Google's and NVIDIA's data sheets; float16 for T4 and V100.
_KINDS = (
    ("tpu v4", TPU_FLOPS["v4"]),
    ("tpu v5 lite", TPU_FLOPS["v5e"]),
    ("tpu v5e", TPU_FLOPS["v5e"]),
    ("tpu v5", TPU_FLOPS["v5p"]),
    ("tpu v6", TPU_FLOPS["v6e"]),
    ("b200", 2250e12),
    ("h200", 989e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("nvidia l4", 121e12),
    ("tesla t4", 65e12),
    ("v100", 125e12),
)


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device; None where it is unknown, as for a CPU.

    Args:
        device_kind: as JAX reports it, such as `TPU v5 lite` or `NVIDIA H100 80GB HBM3`.
    """
    kind = device_kind.lower()
    return next((flops for words, flops in _KINDS if words in kind), None)
