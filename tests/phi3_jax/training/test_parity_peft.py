"""Training here against PEFT and torch: gradients, twenty steps, and the adapter both ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax.config.loader import TrainingConfig
from phi3_jax.evaluation.loss import batch_loss
from phi3_jax.training.optimizer import make_optimizer
from phi3_jax.training.step import TrainState, jit_train_step, partition
from tests.conftest import SHAPES, forward, tiny_hf_model

STEPS = 20


@pytest.fixture
def pair(tmp_path, shape):
    """One start in both: PEFT loads the adapter that was made here, after B is no longer zero."""
    base = tiny_hf_model(**(shape | {"initializer_range": 0.1}))
    base.save_pretrained(tmp_path / "base")
    model = phi3_jax.load(tmp_path / "base")
    config = lora_flax.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    lora_flax.wrap(model, config, rngs=nnx.Rngs(3))
    graphdef, trainable, frozen = partition(model)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), trainable
    )
    nnx.update(model, trainable)
    lora_flax.save_peft(model, tmp_path / "start", base_model_name_or_path=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    return theirs, graphdef, trainable, frozen


def make_batches(length: int = 40):
    """Rows of unequal lengths, some tokens masked; longer than LongRoPE's original length."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        # At least one row is long: transformers picks LongRoPE's factors for the whole batch, so
        # that rows on both sides of the original length could not agree.
        lengths = np.full((3, 1), length) - rng.integers(0, 7, (3, 1))
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length))
        segment_ids = (positions < lengths).astype(np.int32)
        targets = (rng.random((3, length)) < 0.5) & (segment_ids == 1)
        targets[:, 0] = False
        yield {
            "tokens": rng.integers(3, 128, (3, length), dtype=np.int32),
            "segment_ids": segment_ids,
            "positions": positions * segment_ids,
            "targets": targets,
        }


def torch_batch(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and attention mask, as transformers takes them."""
    tokens = torch.from_numpy(batch["tokens"]).long()
    labels = torch.where(torch.from_numpy(batch["targets"]), tokens, -100)
    return tokens, labels, torch.from_numpy(batch["segment_ids"])


def torch_loss(model, batch):
    tokens, labels, mask = torch_batch(batch)
    return model(input_ids=tokens, attention_mask=mask, labels=labels).loss


def check_gradients(graphdef, trainable, frozen, theirs, batch) -> None:
    """Relative L2 1e-4 for each A and B of each layer, against what `theirs` has in `.grad`."""
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}

    def loss(trainable, frozen):
        sums = batch_loss(graphdef, trainable, frozen, batch, None, remat="full")
        return sums.objective / sums.targets

    checked = 0
    for path, grad in nnx.to_flat_state(jax.jit(jax.grad(loss))(trainable, frozen)):
        *module, _, _, leaf = path  # ... adapters default lora_A
        for layer in range(len(grad[...])):
            name = ".".join(["base_model.model", *module[:2], str(layer), *module[2:], leaf])
            want = expected[f"{name}.default.weight"].T
            error = np.linalg.norm(grad[...][layer] - want) / np.linalg.norm(want)
            assert error < 1e-4, (name, error)
            checked += 1
    assert checked == len(expected)


def test_lora_gradients(pair):
    theirs, graphdef, trainable, frozen = pair
    batch = next(make_batches())
    theirs.train()
    torch_loss(theirs, batch).backward()
    check_gradients(graphdef, trainable, frozen, theirs, batch)


def test_twenty_steps(pair):
    """The loss of each of 20 steps within 1e-3: AdamW, warm-up, cosine, weight decay, clipping."""
    theirs, graphdef, trainable, frozen = pair
    config = TrainingConfig(
        output_dir="x", learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=4,
        weight_decay=0.01, max_grad_norm=1.0,
    )  # fmt: skip
    tx = make_optimizer(config, STEPS)
    state = TrainState(trainable, tx.init(trainable))
    step = jit_train_step(graphdef, tx, "full")
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01)
    scheduler = transformers.get_scheduler("cosine", optimizer, 4, STEPS)
    theirs.train()
    ours, expected = [], []
    for i, batch in enumerate(make_batches()):
        stacked = {name: array[None] for name, array in batch.items()}
        state, metrics = step(state, frozen, stacked, jnp.int32(i), jnp.uint32(0))
        ours.append(float(metrics.loss))
        loss = torch_loss(theirs, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        expected.append(loss.item())
        np.testing.assert_allclose(metrics.grad_norm, norm.item(), rtol=1e-2)
    assert max(expected) - min(expected) > 0.05  # something was learned or at least moved
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_adapter_both_ways_and_merged(tmp_path, name):
    """PEFT's adapter gives PEFT's logits here; ours gives ours there; merged = unmerged."""
    base = tiny_hf_model(**SHAPES[name])
    base.save_pretrained(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(3, 128, (2, 40), dtype=np.int32)
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", use_rslora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()

    model = phi3_jax.load(tmp_path / "base")
    plain = np.asarray(forward(model, tokens))
    assert np.abs(plain - expected).max() > 0.1
    lora_flax.load_peft(model, tmp_path / "theirs")
    np.testing.assert_allclose(forward(model, tokens), expected, rtol=0, atol=2e-4)

    lora_flax.save_peft(model, tmp_path / "ours", base_model_name_or_path=str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(tiny_hf_model(**SHAPES[name]), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            again(torch.from_numpy(tokens).long()).logits,
            forward(model, tokens),
            rtol=0,
            atol=2e-4,
        )

    lora_flax.merge_and_unload(model)
    phi3_jax.save(model, tmp_path / "merged")
    merged = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        logits = merged(torch.from_numpy(tokens).long()).logits
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
