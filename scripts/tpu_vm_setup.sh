#!/usr/bin/env bash
# Sets up one worker of a TPU VM: clones this project to ~/phi3-jax and installs it, with JAX for TPUs,
# into ~/phi3-jax/.venv.
#
#     bash tpu_vm_setup.sh REPOSITORY [BRANCH]
#
# Run it on all workers at once (see docs/hosts.md for the command): at the end they connect and each
# reports its chips. Running it again updates the checkout. The variable EXTRA selects an extra of
# pyproject.toml other than tpu.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: bash tpu_vm_setup.sh REPOSITORY [BRANCH]" >&2
    exit 2
fi
repository=$1
branch=${2:-main}
folder=$HOME/phi3-jax

if [ -d "$folder/.git" ]; then
    git -C "$folder" fetch --quiet origin "$branch"
    git -C "$folder" checkout --quiet -B "$branch" FETCH_HEAD
else
    git clone --quiet --branch "$branch" "$repository" "$folder"
fi

# The VM images have Python 3.10, but this project needs 3.11; uv downloads it if it is missing.
if ! uv=$(command -v uv); then
    curl -LsSf https://astral.sh/uv/install.sh | sh
    uv=$HOME/.local/bin/uv
fi
cd "$folder"
[ -d .venv ] || "$uv" venv --quiet --python 3.11 .venv
"$uv" pip install --quiet --python .venv/bin/python ".[${EXTRA:-tpu}]"

.venv/bin/python - <<'PYTHON'
import os

import jax

if os.environ.get("EXTRA", "tpu") == "tpu":
    jax.distributed.initialize()
print(
    f"worker {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
    f"{jax.device_count()} {jax.devices()[0].device_kind}"
)
PYTHON
