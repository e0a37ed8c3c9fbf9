"""Batches: order by (seed, epoch), any step by itself, every example once an epoch."""

from __future__ import annotations

import numpy as np
import pytest

from phi3_jax.config.data import DataConfig
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.batches import Batches, BatchPlan, eval_batches, pad
from phi3_jax.data.masks import Example


def make_examples(count: int) -> list[Example]:
    """Example i has i + 2 tokens, all i + 1, all but the first learned."""
    return [Example(np.full(i + 2, i + 1, np.int32), np.arange(i + 2) > 0) for i in range(count)]


def make(count=11, seed=0, batch_size=2, accumulation=2) -> Batches:
    return Batches(make_examples(count), batch_size, accumulation, seed, 8, 16)


def seen(batches: Batches, epoch: int) -> list[int]:
    """First token of every real row of an epoch, in order."""
    first = epoch * batches.steps_per_epoch
    steps = [batches[first + i] for i in range(batches.steps_per_epoch)]
    return [int(t) for b in steps for t in b["tokens"][..., 0].reshape(-1) if t]


def test_every_example_once_an_epoch_in_another_order():
    batches = make()
    assert batches.steps_per_epoch == 3
    epochs = [seen(batches, epoch) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(1, 12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_function_of_seed_and_epoch():
    assert seen(make(), 1) == seen(make(), 1)
    assert seen(make(seed=0), 0) != seen(make(seed=1), 0)


def test_any_step_by_itself():
    one, other = make(), make()
    for step in range(7):
        one[step]
    np.testing.assert_array_equal(one[7]["tokens"], other[7]["tokens"])


def test_shapes_and_padding():
    batch = make()[0]
    assert batch["tokens"].shape[:2] == (2, 2)
    assert batch["tokens"].shape[2] in (8, 16)
    real = batch["segment_ids"] == 1
    assert (batch["tokens"][real] > 0).all()
    assert not batch["tokens"][~real].any() and not batch["targets"][~real].any()
    assert not batch["positions"][~real].any()
    lengths = real.sum(axis=-1)
    np.testing.assert_array_equal(batch["positions"].max(axis=-1), lengths - 1)
    np.testing.assert_array_equal(batch["targets"].sum(axis=-1), lengths - 1)


def test_short_last_batch_has_empty_rows():
    last = make()[2]  # 11 examples in steps of 4
    assert (last["segment_ids"].max(axis=-1).reshape(-1) == 0).sum() == 1


@pytest.mark.parametrize("multiple", [1, 8, 5])
def test_length_never_exceeds_max_length(multiple):
    batch = pad([[e] for e in make_examples(11)], 12, multiple, max_length=12)
    assert batch["tokens"].shape == (12, 12)


def test_evaluation_sees_everything_longest_first():
    batches = list(eval_batches(make_examples(11), 4, 8, 16))
    assert [b["tokens"].shape for b in batches] == [(4, 16), (4, 8), (4, 8)]
    rows = [int(t) for b in batches for t in b["tokens"][:, 0] if t]
    assert rows == list(range(11, 0, -1))


def test_a_plan_takes_rows_for_every_device_from_the_config():
    """Micro-batches and evaluation batches as the config sizes them, for each of two devices."""
    data = DataConfig(path="x", max_length=16, pad_to_multiple_of=8)
    training = TrainingConfig(
        output_dir="x", per_device_train_batch_size=1, gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    plan = BatchPlan.from_config(data, training, devices=2)
    batches, expected = plan.train_batches(make_examples(11), seed=0), make()
    assert batches.steps_per_epoch == expected.steps_per_epoch
    for name, array in expected[1].items():
        np.testing.assert_array_equal(batches[1][name], array)
    for ours, theirs in zip(
        plan.eval_batches(make_examples(11)), eval_batches(make_examples(11), 4, 8, 16), strict=True
    ):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
