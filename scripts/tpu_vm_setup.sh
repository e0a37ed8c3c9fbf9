#!/usr/bin/env bash
# Sets up one worker of a TPU VM: this project with JAX for TPUs, in phi3-jax/.venv of the home folder.
#
#     bash tpu_vm_setup.sh REPOSITORY [BRANCH]
#
# Run it on every worker at once (docs/hosts.md has the command): at its end the workers count their
# chips together. May be run again. EXTRA, by default tpu, names another extra of pyproject.toml.
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

# The images have Python 3.10, this project needs 3.11: uv fetches one where it is wanting.
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
