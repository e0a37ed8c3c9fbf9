"""One process of a run that stays for the next: takes command lines from its standard input.

A line is JSON, `[folder, arguments]`. The command runs in that folder, what it prints is added to
`log.txt` there, and its exit code is the answer. The first `train` joins the processes as it would
alone; those after it find them joined. Buckets are folders in $TEST_BUCKETS.
"""

from __future__ import annotations

import json
import os
import sys

from tests.once import compiled_once, share_data_preparation


def bucket_of_folders(scheme: str):
    import fsspec

    options = {"auto_mkdir": True}
    path = os.environ["TEST_BUCKETS"]
    return fsspec.filesystem("dir", path=path, target_protocol="file", target_options=options)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        os.chdir(folder)
        with open("log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        from phi3_jax import buckets
        from phi3_jax.cli.main import main as command

        buckets._file_system = bucket_of_folders
        code = command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    share_data_preparation()
    with compiled_once():
        main()
