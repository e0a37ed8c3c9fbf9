"""What a training run imports, for processes to be forked with it."""

# ruff: noqa: F401

import gc

from phi3_jax.no_torch import without_torch

with without_torch():
    import datasets
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import orbax.checkpoint
    import tensorstore
    import tokenizers.trainers
    import transformers.models.auto.tokenization_auto

    import phi3_jax.cli.train
    import phi3_jax.training.loop

gc.collect()
gc.freeze()  # marks of the garbage collector would copy what is shared with forks
