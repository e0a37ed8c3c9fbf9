"""`python train.py --config FILE` is `phi3-jax train --config FILE`."""

import sys

from phi3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
