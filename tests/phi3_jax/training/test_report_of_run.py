"""What a run leaves for its report, a trace of its steps, and its model card."""

from __future__ import annotations

import gzip
import json

import huggingface_hub
import jax
import pytest

from phi3_jax import UserError
from phi3_jax.config.training import TrainingConfig
from phi3_jax.report.folder import read_run
from phi3_jax.training.loop import train
from phi3_jax.training.profiling import Profile
from phi3_jax.training.record import Record
from phi3_jax.training.sweep.run import train_sweep
from tests.phi3_jax.conftest import make_config


@pytest.fixture(scope="module")
def finished(checkpoint, chats, tmp_path_factory):
    """A run of three steps, of which two are traced."""
    output = tmp_path_factory.mktemp("run")
    config = make_config(
        checkpoint, chats, output, data={"test_size": 2}, max_steps=3, profile_steps=[2, 3],
        sample_prompts=["Tell me about tea."], sample_max_new_tokens=4,
    )  # fmt: skip
    return train(config, command="phi3-jax train --config x"), output


def test_leaves_a_report(finished):
    """What the report reads is there: see tests/phi3_jax/report for what it makes of it."""
    _, output = finished
    run = read_run(output)
    (attempt,) = run.attempts
    assert (attempt["state"], attempt["step"], attempt["first_step"]) == ("finished", 3, 0)
    assert attempt["command"] == "phi3-jax train --config x"
    seconds = attempt["seconds"]
    phases = {"data and model", "steps", "compiling", "evaluation", "saving", "samples", "export"}
    assert phases <= seconds.keys() and min(seconds.values()) >= 0
    assert attempt["memory"]["steps"]["host"] > 2**26 and attempt["versions"]["jax"]
    rows = run.record["data"]["training"]
    assert sum(count for _, _, count in rows["histogram"]) == rows["examples"] == 10
    assert all(value > 0 for _, value in run.series["tflops_per_second"])
    assert "utilization" not in run.series  # the peak of a CPU is not known
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5 and "Tell me about tea." in page


@pytest.mark.parametrize("several", [False, True], ids=["run", "sweep"])
def test_a_run_that_is_killed_has_a_report(checkpoint, chats, tmp_path, monkeypatch, several):
    config = make_config(checkpoint, chats, tmp_path, max_steps=2, save_steps=1)
    if several:
        sweep = type(config.sweep)(learning_rate=[1e-3, 1e-2])
        config = config.model_copy(update={"sweep": sweep})
    monkeypatch.setattr(Record, "end", lambda record, state="finished": "")  # killed before it
    (train_sweep if several else train)(config)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    if not several:
        assert "step 1 of 2: in training when this page was written" in page


def test_the_card_has_results_and_a_picture(finished):
    result, output = finished
    card = huggingface_hub.ModelCard.load(output / "adapter" / "README.md")
    values = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert values["loss"] == pytest.approx(result.evaluations[3]["eval_loss"], abs=1e-6)
    assert "![Training and held-out loss over steps](loss.png)" in card.text
    assert (output / "adapter" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "phi3-jax train --config x" in card.text and f"jax {jax.__version__}" in card.text


def test_a_trace_that_xprof_and_perfetto_open(finished):
    _, output = finished
    (folder,) = (output / "profile" / "plugins" / "profile").iterdir()
    (xplane,) = folder.glob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(xplane)).planes
    named = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert "train" in named
    with gzip.open(folder / "perfetto_trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e}
    assert steps == {"2", "3"}


def test_steps_to_trace_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"profile_steps: \[2, 7\], but the run has 6 steps"):
        Profile.of_run([2, 7], tmp_path, 0, 6)
    for steps in ([3, 2], [0, 1], [1], [1, 2, 3]):
        with pytest.raises(ValueError, match="profile_steps"):
            TrainingConfig(output_dir="x", profile_steps=steps)


def test_a_sweep_compares_its_members(checkpoint, chats, tmp_path):
    config = make_config(checkpoint, chats, tmp_path, data={"test_size": 2}, max_steps=2)
    sweep = type(config.sweep)(learning_rate=[1e-3, 1e-2])
    train_sweep(config.model_copy(update={"sweep": sweep}))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "learning_rate=0.01 (best)" in page and "Settings that differ" in page
    assert (tmp_path / "learning_rate=0.01" / "adapter" / "loss.png").is_file()
