"""Follow the Dockerfile's steps for one target in a fresh virtual environment, without Docker.

    python scripts/docker_steps.py [--target cpu] [--dry-run]

It copies what the Dockerfile copies and nothing else, runs its `pip` lines with the absolute paths
below a temporary folder, then the image's entry point: its own command, and a look at the
quickstart's data where the target has them. `--dry-run` only resolves what would be installed, for
targets whose wheels are large. Steps that need root (the user) are left out, and the Python is the
one that runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; each begins with those of the stage that it is built on."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        elif instruction and not instruction.startswith("#") and name:
            found[name].append((instruction, rest.strip()))
    return found


class Image:
    """A folder and a virtual environment in place of an image."""

    def __init__(self, folder: Path, dry_run: bool):
        self.folder, self.dry_run = folder, dry_run
        self.work = folder
        self.programs = folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=True)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
        self.environment["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        self.environment["XDG_CACHE_HOME"] = str(folder / "cache")

    def inside(self, path: str) -> Path:
        """Where a path of the image is."""
        return self.folder / path.lstrip("/") if path.startswith("/") else self.work / path

    def shell(self, command: str) -> None:
        """Run a command in the current folder."""
        print(f"+ {command}", flush=True)
        subprocess.run(
            ["bash", "-ec", command], cwd=self.work, env=self.environment, check=True, timeout=1800
        )

    def follow(self, instruction: str, rest: str) -> None:
        """Do what one instruction says."""
        if instruction == "WORKDIR":
            self.work = self.inside(rest)
            self.work.mkdir(parents=True, exist_ok=True)
        elif instruction == "ENV":
            self.environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif instruction == "COPY" and not rest.startswith("--from="):
            *names, target = rest.split()
            for name in names:
                source, place = ROOT / name, self.inside(target)
                if source.is_dir():
                    shutil.copytree(
                        source, place, ignore=shutil.ignore_patterns("__pycache__", ".*")
                    )
                else:
                    shutil.copy(source, place)
        elif instruction == "RUN" and "useradd" not in rest:
            command = re.sub(r"(?<![\w.])/wheels", str(self.folder / "wheels"), rest)
            if self.dry_run:
                command = command.replace("pip install", "pip install --dry-run")
            self.shell(command)


def main() -> None:
    """Follow the steps of one target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu", choices=["cpu", "gpu", "tpu"])
    parser.add_argument("--dry-run", action="store_true", help="install nothing, only resolve")
    args = parser.parse_args()
    known = stages()
    print(f"Python {sys.version.split()[0]}; the target {args.target}", flush=True)
    with tempfile.TemporaryDirectory(prefix="docker-steps-") as folder:
        image = Image(Path(folder), args.dry_run)
        for step in [*known["wheel"], *known[args.target]]:
            image.follow(*step)
        if not args.dry_run:
            settings = dict(known[args.target])
            entry = " ".join(json.loads(settings["ENTRYPOINT"]))
            image.shell(f"{entry} {' '.join(json.loads(settings['CMD']))}")
            image.shell(f"{entry} configs")
            if args.target == "cpu":
                image.shell(f"{entry} init && {entry} preview --config quickstart.yaml --rows 1")
    print("every step was followed")


if __name__ == "__main__":
    main()
