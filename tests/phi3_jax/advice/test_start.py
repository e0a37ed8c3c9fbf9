"""The lines at the start of a run, and the padding that they report."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import lora_flax
from lora_flax.summary import LayerReport
from phi3_jax.advice.lengths import filling, length_advice
from phi3_jax.advice.start import clock_of, look_ahead
from phi3_jax.config.loader import RunConfig
from phi3_jax.data.batches import Batches
from phi3_jax.data.masks import Example
from phi3_jax.data.report import DataReport

CONFIG = RunConfig.model_validate(
    {"model": {"path": "x"}, "data": {"path": "x"}, "training": {"output_dir": "x"}}
)
ADAPTER = lora_flax.Report(
    (LayerReport("layers.mlp.down_proj", 1, 1, 1, "16", 1000),), trainable=1000, total=10**6
)


def batches(lengths: list[int], rows: int = 2, **settings) -> Batches:
    examples = [Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    given = {"pad_to_multiple_of": 1, "max_length": 100, "accumulation": 1, "seed": 0} | settings
    return Batches(examples, batch_size=rows, **given)


def lines(given: Batches, learned: int = 900, adapter=ADAPTER) -> list[str]:
    report = DataReport(tokens=2 * learned, target_tokens=learned)
    return look_ahead(CONFIG, 3072, adapter, report, given)[0].splitlines()


def test_three_lines():
    assert lines(batches([100] * 4)) == [
        "capacity: 1,000 trainable parameters for 900 learned tokens, 1.1 per token",
        "learning rate: 2e-4 is within the 1e-4 to 5e-4 that LoRA papers use with AdamW at "
        "lora_alpha 32, whatever the rank",
        "batches: 50% of the tokens are learned, 0% of the positions are padding",
    ]


def test_what_is_out_of_proportion_is_said():
    attention = dataclasses.replace(ADAPTER.layers[0], name="layers.self_attn.o_proj")
    adapter = dataclasses.replace(ADAPTER, layers=(attention,))
    capacity, _, data = lines(batches([10, 90] * 40, rows=40), learned=3000, adapter=adapter)
    assert "try peft.r 64" in capacity and "peft.target_modules: all-linear" in capacity
    assert "44% of the positions are padding (with data.packing: 0%)" in data
    assert "40 rows per step" in data


def test_padding_of_the_batches_themselves():
    """Against the batches that a run builds, the last step of an epoch included."""
    given = batches([7, 30, 64, 50, 12], pad_to_multiple_of=16)
    built = [given[step] for step in range(given.steps_per_epoch)]
    found = filling(given)
    assert found.positions == np.mean([batch["tokens"].size for batch in built])
    # The empty row that fills up the last step does not count.
    sizes = sum(batch["tokens"].size for batch in built) - built[-1]["tokens"].shape[-1]
    assert found.padding == pytest.approx(1 - (7 + 30 + 64 + 50 + 12) / sizes)
    packed = dataclasses.replace(given, packing=True)
    rows = len(packed.rows(0))
    assert found.packed == pytest.approx(1 - (7 + 30 + 64 + 50 + 12) / (rows * 100))
    assert filling(packed).packed is None
    assert clock_of([given, given])._mean == 2 * found.positions


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [([100] * 99 + [900], 4096, 128), ([100] * 50 + [900] * 50, 4096, 1024), ([900], 512, 512)],
)
def test_a_length_for_99_of_100_rows(lengths, limit, expected):
    found = length_advice(np.array(lengths), 128, limit)
    assert found.max_length == expected
    assert found.percentiles[100] == max(lengths)
