"""What a resumed run takes over besides the arrays, and what a refused one leaves alone."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.report.folder import read_run
from phi3_jax.training import loop
from phi3_jax.training.loop import train
from tests.phi3_jax.conftest import make_config


def records(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def killed(checkpoint, chats, tmp_path, monkeypatch):
    """A run with evaluations that was killed after step 3 of 4; step 2 was skipped."""
    config = make_config(
        checkpoint, chats, tmp_path, data={"test_size": 2}, max_steps=4, save_steps=2,
        eval_steps=2, on_nonfinite="skip",
    )  # fmt: skip
    real_step = loop.Run.start_step

    def step(run):
        if run.step == 3:
            raise KeyboardInterrupt
        frozen = run.frozen
        if run.step == 1:
            run.frozen = jax.tree.map(lambda leaf: leaf * np.nan, frozen)
        flight = real_step(run)
        run.frozen = frozen
        return flight

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "start_step", step)
        train(config)
    return config, tmp_path


def test_resumed_run_knows_what_came_before(killed):
    config, output = killed
    result = train(config, resume=True)
    assert result.skipped == 1
    assert list(result.evaluations) == [0, 2, 4]
    card = (result.adapter / "README.md").read_text()
    assert "after 0 steps" in card and "after 4 steps" in card
    lines = [r for r in records(output) if "learning_rate" in r]
    assert [r["step"] for r in lines] == [1, 2, 3, 4]
    assert "loss" not in lines[1] and lines[1]["grad_norm"] is None
    # Linear from 1e-2 to 0 over 4 steps; the skipped step does not count.
    np.testing.assert_allclose(
        [lines[i]["learning_rate"] for i in (0, 2, 3)], [1e-2, 0.75e-2, 0.5e-2], rtol=1e-6
    )

    before = records(output)
    again = train(config, resume=True)  # nothing is left of it: exported once more
    assert records(output) == before
    assert again.evaluations == result.evaluations


def test_a_finished_run_is_extended(checkpoint, chats, tmp_path, monkeypatch):
    """With the bytes of a run that was to be that long from the start.

    That one has no checkpoint of step 3, where the other ended, and so cannot export it.
    """
    losses = {0: 9.0, 1: 5.0, 2: 4.0, 3: 1.0, 4: 2.0, 5: 3.0}
    real_evaluate = loop.Run.evaluate

    def evaluate(run):
        real_evaluate(run)
        run.evaluations[0][run.step]["eval_loss"] = losses[run.step]

    monkeypatch.setattr(loop.Run, "evaluate", evaluate)
    settings = {"max_steps": 3, "warmup_steps": 1, "eval_steps": 1, "save_steps": 2}
    settings |= {"load_best_model_at_end": True}

    def config(name, **extend):
        return make_config(
            checkpoint, chats, tmp_path / name, {"test_size": 2}, **settings, **extend
        )

    whole, first = train(config("whole", extend=2)), train(config("parts"))
    assert (first.steps, whole.steps) == (3, 5)
    assert read_run(tmp_path / "parts").result_step == 3
    longer = train(config("parts", extend=2), True)
    assert read_run(tmp_path / "parts").result_step == 4
    file = "adapter_model.safetensors"
    assert (longer.adapter / file).read_bytes() == (whole.adapter / file).read_bytes()
    rates = [r["learning_rate"] for r in records(tmp_path / "parts") if "learning_rate" in r]
    np.testing.assert_allclose(rates, [0, 1e-2, 0.5e-2, 0, 1e-2], rtol=1e-6)


def test_refused_resume_leaves_the_run_alone(killed):
    config, output = killed
    files = {p: p.read_bytes() for p in (output / "config.yaml", output / "metrics.jsonl")}
    changed = config.training.model_copy(update={"learning_rate": 2e-2})
    with pytest.raises(UserError, match="training.learning_rate was 0.01 and is now 0.02"):
        train(config.model_copy(update={"training": changed}), resume=True)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_output_dir_that_cannot_be_made(checkpoint, chats, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"training\.output_dir: .*file"):
        train(make_config(checkpoint, chats, tmp_path / "file" / "run"))
