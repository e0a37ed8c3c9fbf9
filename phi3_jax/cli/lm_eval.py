"""Run EleutherAI's lm-evaluation-harness on a Phi-3 checkpoint, with the harness's arguments."""

from __future__ import annotations

from phi3_jax.evaluation import lm_eval
from phi3_jax.platform import keep_compiled


def run(argv: list[str]) -> int:
    """Pass the arguments on to the harness."""
    keep_compiled()
    lm_eval.main(argv)
    return 0
