"""Whole runs on a tiny model: what they leave, resuming, stopping, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import lora_flax
import phi3_jax
from phi3_jax import UserError
from phi3_jax.cli import main as cli
from phi3_jax.report.folder import read_run
from phi3_jax.training import loop
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.loop import NonFiniteError, train
from tests.conftest import ROOT, forward
from tests.phi3_jax.conftest import make_config, write_config


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(checkpoint, chats, tmp_path_factory):
    """One whole run with evaluation, samples and TensorBoard."""
    output = tmp_path_factory.mktemp("run")
    config = make_config(
        checkpoint, chats, output, data={"test_size": 2}, eval_steps=3, report_to=["tensorboard"],
        sample_prompts=["Tell me about tea."], sample_max_new_tokens=8,
    )  # fmt: skip
    return config, train(config), output


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva"},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["o_proj"]},
    ],
    ids=str,
)
def test_options_of_the_adapter(checkpoint, chats, tmp_path, fields):
    """A run with each ends with a lower loss and an adapter that loads."""
    config = make_config(checkpoint, chats, tmp_path, {"test_size": 3})
    peft = config.peft.model_copy(update=fields)
    result = train(config.model_copy(update={"peft": peft}))
    assert result.evaluations[6]["eval_loss"] < result.evaluations[0]["eval_loss"]
    model = phi3_jax.load(checkpoint)
    lora_flax.load_peft(model, result.adapter)


def test_leaves_everything(finished):
    config, result, output = finished
    assert result.steps == 6 and result.skipped == 0
    assert list(result.evaluations) == [0, 3, 6]
    assert result.evaluations[6]["eval_loss"] < result.evaluations[0]["eval_loss"] - 0.1
    lines = records(output)
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "grad_norm", "mean_token_accuracy", "tokens_per_second",
            "epoch"} <= lines[1].keys()  # fmt: skip
    assert [r["step"] for r in lines if "eval_loss" in r] == [0, 3, 6]
    evaluation = next(r for r in lines if "eval_loss" in r)
    assert np.isclose(evaluation["eval_perplexity"], np.exp(evaluation["eval_loss"]))
    (sample,) = [json.loads(s) for s in (output / "samples.jsonl").read_text().splitlines()]
    assert sample.keys() == {"prompt", "before", "after"}
    assert list((output / "tensorboard").glob("events*"))
    assert phi3_jax.config.loader.load_config(output / "config.yaml") == config
    card = (output / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "after 6 steps" in card
    assert not list(output.rglob(".*tmp*")) + list(output.rglob("*.tmp"))


def test_adapter_gives_the_same_logits_in_peft(finished, checkpoint):
    _, result, _ = finished
    tokens = np.random.default_rng(0).integers(3, 32000, (2, 30), dtype=np.int32)
    model = phi3_jax.load(checkpoint)
    plain = np.asarray(forward(model, tokens))
    lora_flax.load_peft(model, result.adapter)
    base = transformers.Phi3ForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(forward(model, tokens), expected, rtol=0, atol=2e-4)
    assert np.abs(plain - expected).max() > 1e-2
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.adapter)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])["input_ids"]


def test_same_seed_same_bytes_and_resumed_equals_unbroken(finished, checkpoint, chats, tmp_path):
    """Killed after step 4 (the last checkpoint is of step 3), resumed: the same adapter bytes."""
    config, _, unbroken = finished
    update = {"output_dir": str(tmp_path), "sample_prompts": [], "report_to": ["none"]}
    config = config.model_copy(update={"training": config.training.model_copy(update=update)})
    real_step = loop.Run.start_step

    def killed(run):
        if run.step == 4:
            raise KeyboardInterrupt  # as a kill: nothing is saved on the way out
        return real_step(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "start_step", killed)
        train(config)
    assert not (tmp_path / "adapter").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a line that was being written
    train(config, resume=True)
    assert adapter_bytes(tmp_path) == adapter_bytes(unbroken)
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(records(tmp_path), records(unbroken), strict=True):
        assert ours.get("loss") == theirs.get("loss")


def test_a_signal_ends_the_step_and_leaves_a_checkpoint(checkpoint, chats, tmp_path):
    config = make_config(checkpoint, chats, tmp_path, max_steps=10_000, save_steps=None)
    threading.Thread(target=kill_when_training, args=(tmp_path / "metrics.jsonl",)).start()
    with pytest.raises(Interrupted, match="--resume") as caught:
        train(config)
    assert caught.value.signum == signal.SIGTERM
    last = records(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert f"step {last:,} of 10,000: stopped by SIGTERM" in (tmp_path / "report.html").read_text()


def kill_when_training(metrics: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_non_finite(checkpoint, chats, tmp_path, policy):
    """A learning rate that blows everything up: stopped, or skipped; never saved."""
    config = make_config(
        checkpoint, chats, tmp_path, learning_rate=1e30, lr_scheduler_type="constant",
        max_grad_norm=0.0, on_nonfinite=policy, save_steps=1,
    )  # fmt: skip
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=r"loss .* the checkpoint of step \d is intact"):
            train(config)
        assert not (tmp_path / "adapter").exists()
    else:
        result = train(config)
        assert result.skipped > 0
        for tensor in load_file(result.adapter / "adapter_model.safetensors").values():
            assert np.isfinite(tensor).all()


def test_a_run_whose_steps_were_all_skipped_fails(checkpoint, chats, tmp_path, monkeypatch, capsys):
    config = make_config(
        checkpoint, chats, tmp_path / "run", max_steps=2, save_steps=1, on_nonfinite="skip"
    )
    real = loop.Run.take_step

    def take_step(run, placed):
        frozen, run.frozen = run.frozen, jax.tree.map(lambda leaf: leaf * np.nan, run.frozen)
        taken = real(run, placed)
        run.frozen = frozen
        return taken

    monkeypatch.setattr(loop.Run, "take_step", take_step)
    file = write_config(config, tmp_path / "config.yaml")
    for resume in ([], ["--resume"]):
        assert cli.main(["train", "--config", str(file), *resume]) == 1
        assert "every one of the 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_best_checkpoint_is_kept_and_exported(checkpoint, chats, tmp_path, monkeypatch):
    """Whatever the held-out losses are, the lowest decides; here they are given: step 2 wins."""
    losses = {0: 9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}
    real_evaluate = loop.Run.evaluate
    adapters = {}

    def evaluate(run):
        real_evaluate(run)
        run.evaluations[0][run.step]["eval_loss"] = losses[run.step]
        adapters[run.step] = np.asarray(jax.tree.leaves(run.state.trainable)[0])

    answered = {}

    def answer(run, samples, when):
        answered[when] = np.asarray(jax.tree.leaves(nnx.state(run.model(), nnx.LoRAParam))[0])

    monkeypatch.setattr(loop.Run, "answer", answer)
    monkeypatch.setattr(loop.Run, "evaluate", evaluate)
    config = make_config(
        checkpoint, chats, tmp_path, data={"test_size": 2}, max_steps=4, eval_steps=1,
        save_steps=1, save_total_limit=1, load_best_model_at_end=True,
    )  # fmt: skip
    result = train(config)
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {2, 4}
    assert "after 2 steps" in (result.adapter / "README.md").read_text()
    model = phi3_jax.load(checkpoint)
    lora_flax.load_peft(model, result.adapter)
    exported = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))[0]
    np.testing.assert_array_equal(exported, adapters[2])
    np.testing.assert_array_equal(answered["after"], adapters[2])
    assert read_run(tmp_path).result_step == 2
    assert "held-out loss, exported step 2" in (tmp_path / "report.html").read_text()
    assert (adapters[4] != adapters[2]).any()


def test_goes_on_from_a_peft_adapter(finished, checkpoint, chats, tmp_path):
    """With nothing left to learn at rate 0, the adapter comes out as it went in."""
    _, result, _ = finished
    config = make_config(checkpoint, chats, tmp_path, learning_rate=0.0, max_steps=1)
    peft_section = config.peft.model_copy(update={"adapter_name_or_path": str(result.adapter)})
    again = train(config.model_copy(update={"peft": peft_section}))
    before = load_file(result.adapter / "adapter_model.safetensors")
    after = load_file(again.adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize(
    ("section", "update", "message"),
    [
        ("training", {"learning_rate": 2e-2}, "training.learning_rate was 0.01 and is now 0.02"),
        ("peft", {"lora_alpha": 16.0}, "peft.lora_alpha was 8.0 and is now 16.0"),
        ("data", {"max_samples": 5}, "trained on different training data"),
    ],
)
def test_resuming_another_run_is_refused(finished, section, update, message):
    config, _, _ = finished
    changed = getattr(config, section).model_copy(update=update)
    with pytest.raises(UserError, match=message):
        train(config.model_copy(update={section: changed}), resume=True)


def test_damaged_checkpoint_is_named(checkpoint, chats, tmp_path):
    config = make_config(checkpoint, chats, tmp_path, max_steps=1)
    train(config)
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"checkpoints/1: damaged.*--resume=auto to start again"):
        train(config, resume=True)


def test_output_of_an_earlier_run_is_not_overwritten(finished, checkpoint, chats, tmp_path):
    config, _, _ = finished
    with pytest.raises(UserError, match="pass --resume to continue"):
        train(config)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(make_config(checkpoint, chats, tmp_path), resume=True)


HIDE_TORCH = """
import importlib.util, sys
HIDDEN = ("torch", "peft", "loralib", "bitsandbytes")
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in HIDDEN else real(name, package)
)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def test_command_line(checkpoint, chats, tmp_path):
    """As a user runs it, without torch: transformers imports it where it is installed."""
    file = write_config(make_config(checkpoint, chats, tmp_path / "out"), tmp_path / "c.yaml")
    (tmp_path / "sitecustomize.py").write_text(HIDE_TORCH)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", str(file), "training.max_steps=1"],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trainable:" in done.stdout and "step 1/1" in done.stdout
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "did you mean training.learning_rate?"),
        ("peft.target_modules=[x_proj]", "this model has"),
        ("data.path=/nowhere/chats.jsonl", "no such file or folder"),
        ("model.path=/nowhere", "no such folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(
    checkpoint, chats, tmp_path, capsys, override, message
):
    file = write_config(make_config(checkpoint, chats, tmp_path / "out"), tmp_path / "c.yaml")
    assert cli.main(["train", "--config", str(file), override]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "adapter").exists()


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for key in ("target_modules", "gradient_accumulation_steps", "assistant_only_loss"):
        assert key in said
