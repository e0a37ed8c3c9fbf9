"""Several data sets in one run: exact shares, an order from (seed, epoch), their own columns."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax import UserError
from phi3_jax.config.data import DataConfig
from phi3_jax.config.loader import load_config
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.dataset import load_examples
from phi3_jax.data.mixing import Mixture
from phi3_jax.data.tokenizer import load_tokenizer
from tests.phi3_jax.conftest import TOKENIZER


def mixture(sizes, weights, stopping_strategy="first_exhausted"):
    names = tuple("abcdef"[: len(sizes)])
    return Mixture(names, tuple(sizes), tuple(weights), stopping_strategy)


def test_shares_by_hand():
    assert mixture([100, 10], [0.5, 0.5]).counts == (10, 10)
    assert mixture([100, 10], [0.9, 0.1]).counts == (90, 10)
    assert mixture([100, 10], [3, 1], "all_exhausted").counts == (100, 34)
    assert mixture([7, 7, 7], [1, 1, 1]).counts == (7, 7, 7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0.1, 0.25, 1.0, 3.0])),
        min_size=1, max_size=4,
    ),
    st.sampled_from(["first_exhausted", "all_exhausted"]),
)  # fmt: skip
def test_shares_are_exact_and_a_source_is_exhausted(sources, strategy):
    sizes, weights = zip(*sources, strict=True)
    mixed = mixture(sizes, weights, strategy)
    shares = np.array(weights) / sum(weights)
    total = sum(mixed.counts)
    assert np.abs(np.array(mixed.counts) - shares * total).max() <= len(sizes)
    order = mixed.order(draw=1, shuffle=2)
    seen = collections.Counter(order)
    ends = np.cumsum([0, *sizes])
    for i, count in enumerate(mixed.counts):
        times = [seen[n] for n in range(ends[i], ends[i + 1])]
        assert sum(times) == count and max(times) - min(times) <= 1
        if strategy == "all_exhausted":
            assert min(times) >= 1
    exhausted = [n >= size for n, size in zip(mixed.counts, sizes, strict=True)]
    assert all(exhausted) if strategy == "all_exhausted" else any(exhausted)


def test_the_order_follows_from_its_seeds():
    mixed = mixture([50, 20], [1, 1])
    assert list(mixed.order(1, 2)) == list(mixed.order(1, 2))
    assert list(mixed.order(1, 2)) != list(mixed.order(1, 3))
    assert set(mixed.order(1, 2)) == set(mixed.order(1, 3)) != set(mixed.order(2, 2))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def config(tmp_path):
    for name, rows in {
        "chats": [{"question": f"q{i}", "answer": f"from chats {i}"} for i in range(12)],
        "texts": [{"body": f"from texts {i}"} for i in range(8)],
    }.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return {
        "cache_dir": str(tmp_path / "cache"),
        "sources": [
            {"path": str(tmp_path / "chats.jsonl"), "weight": 3},
            {"path": str(tmp_path / "texts.jsonl"), "weight": 1, "columns": {"text": "body"}},
        ],
    }


@pytest.mark.parametrize("packing", [False, True])
def test_each_source_has_its_columns_and_its_share(config, tokenizer, packing):
    data = DataConfig.model_validate(config | {"packing": packing, "test_size": 0.25})
    train, test = load_examples(data, tokenizer)
    assert (len(train.examples), len(test.examples)) == (9 + 6, 3 + 2)
    assert "an epoch takes 9 of 9 of chats.jsonl, 3 of 6 of texts.jsonl" in str(train.report)
    training = TrainingConfig(output_dir="x", per_device_train_batch_size=2)
    plan = BatchPlan.from_config(data, training)
    batches = plan.train_batches(train.examples, seed=0)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        counts = collections.Counter()
        for step in steps:
            counts.update(
                {name.removeprefix("examples/"): n for name, n in batches.counts(step).items()}
            )
        assert counts == {"chats.jsonl": 9, "texts.jsonl": 3}
        text = " ".join(tokenizer.decode(batches[step]["tokens"].reshape(-1)) for step in steps)
        assert (text.count("from chats"), text.count("from texts")) == (9, 3)
        epochs.append(text)
    assert len(set(epochs)) == 3
    again = plan.train_batches(load_examples(data, tokenizer)[0].examples, seed=0)
    last = 2 * batches.steps_per_epoch
    np.testing.assert_array_equal(again[last]["tokens"], batches[last]["tokens"])


def test_a_source_without_examples_is_named(config, tokenizer, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"other": 1}\n')
    data = DataConfig.model_validate(config | {"on_bad_row": "skip"})
    with pytest.raises(UserError, match="no examples left in .*texts.jsonl"):
        load_examples(data, tokenizer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources=[{path: a.jsonl}]"], "set either path or sources"),
        (["data.path=null"], "data.path: missing"),
        (["data.path=null", "data.sources=[{weight: 2}]"], "data.sources: path is missing"),
        (["data.path=null", "data.sources=[{path: a}]", "data.split=x"], "in each of data.sources"),
        (["data.path=null", "data.sources=[{path: a, wieght: 2}]"], "wieght"),
    ],
)
def test_a_config_that_cannot_be_meant(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("phi3_mini_4k_lora", ["data.split=train", "data.test_split=null", *overrides])
