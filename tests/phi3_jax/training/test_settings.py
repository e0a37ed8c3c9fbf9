"""Whole runs with each of the settings that change what a run does between its steps."""

from __future__ import annotations

import pytest

from phi3_jax.config.run import ANSWER_METRICS, METRICS
from phi3_jax.evaluation.metrics import evaluate
from phi3_jax.training import loop
from phi3_jax.training.loop import train
from phi3_jax.training.restore import write_checkpoint_adapter
from tests.phi3_jax.conftest import make_config

pytestmark = pytest.mark.slow


def adapter_bytes(output):
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("optim", ["adafactor", "lora_muon", "schedule_free_adamw"])
def test_optimizers_train_and_resume_to_the_same_bytes(checkpoint, chats, tmp_path, optim):
    """Killed after step 3; the last checkpoint is of step 2."""

    def config(output):
        return make_config(
            checkpoint, chats, output, {"test_size": 2}, optim=optim, max_steps=4, save_steps=2,
            lr_scheduler_type="constant", weight_decay=0.1,
        )  # fmt: skip

    result = train(config(tmp_path / "whole"))
    assert result.evaluations[4]["eval_loss"] < result.evaluations[0]["eval_loss"]
    real_step = loop.Run.start_step

    def killed(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return real_step(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "start_step", killed)
        train(config(tmp_path / "killed"))
    train(config(tmp_path / "killed"), resume=True)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    # The adapter of a checkpoint is what the run exports: the average, if there is one.
    write_checkpoint_adapter(tmp_path / "whole", "last", tmp_path / "again" / "adapter")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "whole")
    if optim == "schedule_free_adamw":  # the average is also what was evaluated
        found = evaluate(config(tmp_path / "whole"), result.adapter, max_questions=1)
        expected = result.evaluations[4]["eval_loss"]
        assert found.metrics["adapter"]["loss"] == pytest.approx(expected, abs=1e-5)


def test_generated_answers_are_measured_at_every_evaluation(checkpoint, chats, tmp_path):
    """By the numbers of `phi3-jax evaluate`; the best of them chooses what is exported."""
    config = make_config(
        checkpoint, chats, tmp_path, {"test_size": 3}, eval_generate=True, eval_strategy="epoch",
        eval_generate_max_new_tokens=6, eval_generate_max_questions=2, save_strategy="best",
        metric_for_best_model="token_f1", load_best_model_at_end=True, num_train_epochs=2,
        max_steps=-1, early_stopping_patience=9, per_device_eval_batch_size=2,
        loss_type="dft", neftune_noise_alpha=5.0, save_steps=None,
    )  # fmt: skip
    result = train(config)
    assert result.evaluations.keys() >= {0, 3, 6}
    for record in result.evaluations.values():
        assert record.keys() == {*METRICS, *ANSWER_METRICS}
    best = max([3, 6], key=lambda step: result.evaluations[step]["eval_token_f1"])
    measured = evaluate(config, result.adapter, 6, 2).metrics["adapter"]
    for name in ANSWER_METRICS:
        expected = result.evaluations[best][name]
        assert measured[name.removeprefix("eval_")] == pytest.approx(expected, abs=1e-6), name
    assert measured["loss"] == pytest.approx(result.evaluations[best]["eval_loss"], abs=1e-5)
    assert f"after {best} steps" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_run_that_stopped_early_is_finished(checkpoint, chats, tmp_path, monkeypatch, capsys):
    losses = {0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 0.5}
    real = loop.Run.evaluate

    def evaluate_as(run):
        real(run)
        run.evaluations[0][run.step]["eval_loss"] = losses[run.step]
        run.writers[0].write(run.step, run.evaluations[0][run.step])

    monkeypatch.setattr(loop.Run, "evaluate", evaluate_as)
    config = make_config(
        checkpoint, chats, tmp_path, {"test_size": 2}, max_steps=9, eval_steps=1, save_steps=1,
        early_stopping_patience=2, load_best_model_at_end=True,
    )  # fmt: skip
    result = train(config)
    first = adapter_bytes(tmp_path)
    assert result.steps == 3 and "stopped early at step 3" in capsys.readouterr().out
    assert "after 1 steps" in (tmp_path / "adapter" / "README.md").read_text()
    assert train(config, resume=True).steps == 3
    assert adapter_bytes(tmp_path) == first
