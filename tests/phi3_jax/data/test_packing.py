"""Packed rows: nothing lost, nothing cut, few rows, and each example's loss as it is alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

import phi3_jax
from phi3_jax.data.batches import Batches, eval_batches
from phi3_jax.data.masks import Example
from phi3_jax.data.order import grouped_by_length
from phi3_jax.data.packing import pack, wrap
from phi3_jax.evaluation.loss import next_token_loss


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), max_size=60))
def test_every_example_once_and_no_row_too_full(lengths):
    rows = pack(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    # At most one row can be half empty, or its two would have been one.
    assert sum(sum(lengths[i] for i in row) <= 20 for row in rows) <= 1


def test_best_fit_decreasing_by_hand():
    assert pack([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]
    with pytest.raises(ValueError, match="11 tokens fits no row of 10"):
        pack([3, 11], 10)


def test_wrapped_rows_are_full_and_in_order():
    assert wrap([5, 2, 3, 1], 4) == [
        [(0, 0, 4)], [(0, 4, 5), (1, 0, 2), (2, 0, 1)], [(2, 1, 3), (3, 0, 1)],
    ]  # fmt: skip


def joined(batches: Batches, name: str) -> list[int]:
    """The real positions of an epoch's rows, one after the other."""
    return [
        value
        for step in range(batches.steps_per_epoch)
        for row, segments in zip(
            batches[step][name].reshape(4, -1),
            batches[step]["segment_ids"].reshape(4, -1),
            strict=True,
        )
        for value in row[segments > 0].tolist()
    ]


def test_wrapped_batches_hold_every_token_in_full_rows():
    examples = make_examples(40)
    batches = dataclasses.replace(make_batches(examples, True), packing_strategy="wrapped")
    assert sorted(joined(batches, "tokens")) == sorted(
        int(token) for example in examples for token in example.tokens
    )
    segments = [batches[step]["segment_ids"] for step in range(batches.steps_per_epoch)]
    filled = [(row > 0).sum() for batch in segments for row in batch.reshape(4, -1)]
    total = sum(len(example.tokens) for example in examples)
    assert sorted(count for count in filled if count)[1:] == [32] * (total // 32)
    assert max(int(batch.max()) for batch in segments) == 1  # as in TRL: one document per row


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_held_out_rows_are_packed_on_request(strategy):
    examples = make_examples(20)
    rows = list(eval_batches(examples, 4, 8, 32, strategy))
    assert len(rows) < len(list(eval_batches(examples, 4, 8, 32)))
    tokens = [int(t) for batch in rows for t in batch["tokens"][batch["segment_ids"] > 0]]
    assert sorted(tokens) == sorted(int(t) for e in examples for t in e.tokens)


def test_groups_of_similar_length_are_those_of_transformers():
    lengths = np.random.default_rng(0).integers(1, 500, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3)).tolist()
    theirs = get_length_grouped_indices(
        lengths.tolist(), 4, generator=torch.Generator().manual_seed(3)
    )
    assert grouped_by_length(order, lengths, 4) == theirs


def make_examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        n = int(rng.integers(3, 30))
        targets = rng.random(n) < 0.6
        targets[0], targets[1] = False, True
        examples.append(Example(rng.integers(1, 97, n).astype(np.int32), targets))
    return examples


def make_batches(examples: list[Example], packing: bool, seed: int = 0) -> Batches:
    return Batches(
        examples, batch_size=2, accumulation=2, seed=seed, pad_to_multiple_of=8, max_length=32,
        packing=packing,
    )  # fmt: skip


def test_an_epoch_holds_every_example_once():
    examples = make_examples(40)
    batches = make_batches(examples, packing=True)
    assert batches.steps_per_epoch < make_batches(examples, packing=False).steps_per_epoch
    for epoch in (0, 1):
        seen = []
        for step in range(batches.steps_per_epoch):
            batch = batches[epoch * batches.steps_per_epoch + step]
            for row in range(4):
                flat = {name: a.reshape(4, -1)[row] for name, a in batch.items()}
                for segment in range(1, flat["segment_ids"].max() + 1):
                    own = flat["segment_ids"] == segment
                    assert flat["positions"][own].tolist() == list(range(own.sum()))
                    seen.append((flat["tokens"][own].tolist(), flat["targets"][own].tolist()))
        assert sorted(seen) == sorted((e.tokens.tolist(), e.targets.tolist()) for e in examples)
    first, again, other = (make_batches(examples, True, s)[0]["tokens"] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


@pytest.mark.parametrize("window", [None, 7])
def test_packed_and_unpacked_give_the_same_loss(window):
    config = phi3_jax.Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        sliding_window=window,
    )  # fmt: skip
    model = phi3_jax.Phi3(config, rngs=nnx.Rngs(0))

    def total(packing: bool) -> np.ndarray:
        batches = make_batches(make_examples(15), packing)
        sums = np.zeros(3)
        for step in range(batches.steps_per_epoch):
            for i in range(2):
                micro = {name: array[i] for name, array in batches[step].items()}
                hidden = model.hidden_states(
                    micro["tokens"], micro["positions"], micro["segment_ids"]
                )
                loss = next_token_loss(model.head, hidden, micro["tokens"], micro["targets"])
                sums += [float(loss.nll), float(loss.correct), float(loss.targets)]
        return sums

    packed, unpacked = total(True), total(False)
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)
    assert packed[2] > 50
