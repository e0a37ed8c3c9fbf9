"""One process of several that writes its part of many checkpoints: `parts.py FOLDER COUNT`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from phi3_jax.sharding.processes import from_all, join
from phi3_jax.training.state_files import start_part


def main(folder: Path, count: int) -> None:
    peers = join(60, print)
    with peers.together(3):
        process = jax.process_index()
        for step in range(count):
            from_all(step)
            start_part(folder, step, process, {"x": np.full(8, process)})()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
