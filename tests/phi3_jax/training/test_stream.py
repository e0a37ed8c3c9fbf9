"""Streamed data in a run: resumed to the byte, and divided between processes."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from phi3_jax import UserError
from phi3_jax.data.row_streams import Share
from phi3_jax.data.stream_batches import Rows, StreamBatches
from phi3_jax.training import loop
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.loop import train
from phi3_jax.training.state_files import read_record
from phi3_jax.training.stream import divide_rows, find_position
from tests.phi3_jax.conftest import make_config


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(checkpoint, chats, tmp_path):
    """In the middle of a block of packed rows, and with held-out rows that are never trained on."""
    held = tmp_path / "held.jsonl"
    held.write_text("".join(chats.read_text().splitlines(keepends=True)[:2]))
    data = {"streaming": True, "shuffle_buffer_size": 5, "packing": True, "dataset_num_proc": 1}
    data |= {"test_path": str(held)}
    finished, resumed = tmp_path / "finished", tmp_path / "resumed"

    def config(output):
        return make_config(checkpoint, chats, output, data, max_steps=4, save_steps=2)

    result = train(config(finished))
    assert result.evaluations[4]["eval_loss"] < result.evaluations[0]["eval_loss"]
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert max(record.get("held_out_rows", 0) for record in records) >= 2
    position = read_record(finished / "checkpoints", 2)["position"]
    assert position["count"] == 1 and position["shares"]["0"]["block"]["sources"]
    shutil.copytree(finished, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    shutil.rmtree(resumed / "adapter")
    name = "adapter_model.safetensors"
    again = train(config(resumed), resume=True).adapter / name
    assert again.read_bytes() == (result.adapter / name).read_bytes()
    # More data is other data, and a step's position says where in it.
    with chats.open("a") as out:
        out.write(chats.read_text().splitlines()[0] + "\n")
    try:
        shutil.rmtree(resumed / "checkpoints" / "4")
        with pytest.raises(UserError, match="trained on different training data"):
            train(config(resumed), resume=True)
    finally:
        lines = chats.read_text().splitlines(keepends=True)
        chats.write_text("".join(lines[:-1]))


@pytest.mark.slow
def test_a_resumed_run_may_save_before_it_reads(checkpoint, chats, tmp_path, monkeypatch):
    """Where an evaluation was interrupted, a run stopped early, and no step is left."""
    held = tmp_path / "held.jsonl"
    held.write_text(chats.read_text().splitlines(keepends=True)[0])
    data = {"streaming": True, "shuffle_buffer_size": 5, "dataset_num_proc": 1}
    config = make_config(
        checkpoint, chats, tmp_path / "run", data | {"test_path": str(held)}, max_steps=3,
        eval_steps=1, early_stopping_patience=1, early_stopping_threshold=100.0,
    )  # fmt: skip
    real_evaluate = loop.Run.evaluate

    def interrupted(run):
        if run.step == 1:
            run.stop()
        real_evaluate(run)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 1"):
        patch.setattr(loop.Run, "evaluate", interrupted)
        train(config)
    result = train(config, resume=True)
    assert (result.steps, list(result.evaluations)) == (2, [0, 1, 2])
    weights = result.adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    shutil.rmtree(result.adapter)
    assert train(config, resume=True).steps == 2
    assert weights.read_bytes() == content


@pytest.mark.parametrize(
    ("held", "process", "expected"),
    [
        ({0: {0, 1, 2, 3}}, 0, Rows(Share(), (0, 1, 2, 3))),
        ({0: {0, 1}, 1: {2, 3}}, 1, Rows(Share(1, 2), (0, 1, 0, 1))),
        # Two processes that hold the same rows, over another axis of the mesh.
        ({0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}}, 3, Rows(Share(1, 2), (0, 1, 0, 1))),
        ({0: {0, 2}, 1: {1, 3}}, 0, Rows(Share(0, 2), (0, 0, 1, 1))),
        # Not divided: each reads everything.
        ({0: {0, 1, 2}, 1: {2, 3}}, 1, Rows(Share(), (0, 1, 2, 3))),
        ({0: {0}, 1: {1, 2, 3}}, 1, Rows(Share(), (0, 1, 2, 3))),
    ],
)
def test_processes_divide_the_rows(held, process, expected):
    assert divide_rows(held, process, 4) == expected


def test_another_number_of_hosts_cannot_go_on(tmp_path):
    saved = SimpleNamespace(directory=tmp_path, position=lambda step: {"count": 2, "shares": {}})
    plan = SimpleNamespace()
    stream = StreamBatches(None, plan, 0, Rows(Share(), (0,)))
    with pytest.raises(UserError, match="streamed in 2 shares and is now in 1; resume on as many"):
        find_position(stream, saved, 3)
    stream.close()
