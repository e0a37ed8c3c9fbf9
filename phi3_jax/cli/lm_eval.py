"""Run EleutherAI's lm-evaluation-harness on a Phi-3 checkpoint; the arguments are the harness's."""

from __future__ import annotations

from phi3_jax.evaluation import lm_eval
from phi3_jax.platform import keep_compiled


def run(argv: list[str]) -> int:
    """Passes the arguments on."""
    keep_compiled()
    lm_eval.main(argv)
    return 0
