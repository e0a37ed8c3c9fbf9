"""Whole runs on eight simulated devices: what one device gives."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax import UserError
from phi3_jax.config.loader import RunConfig
from phi3_jax.config.sections import MeshConfig
from phi3_jax.training import loop
from phi3_jax.training.loop import train
from phi3_jax.training.setup import set_up
from phi3_jax.training.sweep.members import sweep_members
from phi3_jax.training.sweep.run import train_sweep
from tests.phi3_jax.conftest import make_config

pytestmark = pytest.mark.usefixtures("compiled_anew")

DATA = {"test_size": 3, "packing": True, "max_length": 64, "pad_to_multiple_of": 64}


AXES = ("data", "fsdp", "tensor", "sequence")


def on(mesh: tuple[int, ...], checkpoint, chats, output, rows: int = 8, **training):
    """A run of `rows` rows a micro-batch, whatever the mesh."""
    each = rows // (mesh[0] * mesh[1])
    config = make_config(
        checkpoint, chats, output, DATA, max_steps=3, per_device_train_batch_size=each,
        per_device_eval_batch_size=each, **training,
    )  # fmt: skip
    sizes = dict(zip(AXES, mesh, strict=False))
    return RunConfig.model_validate(config.model_dump() | {"mesh": sizes})


def records(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def killed_after_its_first_step(whole, folder) -> None:
    """What a run of three steps, each of them saved, leaves if it is killed after the first."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "2", "3"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "meshes"),
    [(1, [(8, 1, 1), (2, 2, 2), (1, 2, 1, 4)]), (2, [(1, 8, 1), (1, 1, 8)])],
)
def test_eight_devices_are_one(checkpoint, chats, tmp_path, accumulation, meshes):
    settings = {"gradient_accumulation_steps": accumulation}
    alone = train(on((1, 1, 1), checkpoint, chats, tmp_path / "one", **settings))
    for mesh in meshes:
        output = tmp_path / "x".join(map(str, mesh))
        spread = train(on(mesh, checkpoint, chats, output, **settings))
        for mine, one in zip(records(output), records(tmp_path / "one"), strict=True):
            for name in ("loss", "grad_norm", "eval_loss"):
                if name in one:
                    assert mine[name] == pytest.approx(one[name], rel=1e-5), (mesh, name)
        ours = load_file(spread.adapter / "adapter_model.safetensors")
        for name, value in load_file(alone.adapter / "adapter_model.safetensors").items():
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-3)


def test_everything_lies_where_the_rules_say(checkpoint, chats, tmp_path, monkeypatch):
    loaded, looked_at = [], []

    def look_at(run):
        run.start_step()
        for network in (loaded[0].model.model, run.frozen.model):
            kernel = network.layers.mlp.down_proj.base.kernel[...]
            assert kernel.addressable_shards[0].data.shape == (2, 64 // 2, 64 // 4)
        for leaf in jax.tree.leaves(run.state):
            assert leaf.sharding.mesh.size == 8
        a = run.state.trainable.model.layers.mlp.down_proj.adapters.default.lora_A[...]
        assert a.addressable_shards[0].data.shape == (2, 64 // 2, 4)
        run.start_step()
        assert run.train_step._cache_size() == 1
        looked_at.append(run)

    monkeypatch.setattr(loop, "set_up", lambda *a: loaded.append(set_up(*a)) or loaded[0])
    monkeypatch.setattr(loop, "take_steps", look_at)
    train(on((1, 4, 2), checkpoint, chats, tmp_path))
    assert looked_at


@pytest.mark.slow
def test_resumed_on_a_mesh_ends_with_the_same_bytes(checkpoint, chats, tmp_path):
    whole = train(on((2, 4, 1), checkpoint, chats, tmp_path / "whole", save_steps=1))
    killed_after_its_first_step(tmp_path / "whole", tmp_path / "parts")
    config = on((2, 4, 1), checkpoint, chats, tmp_path / "parts", save_steps=1)
    again = train(config, resume=True)
    file = "adapter_model.safetensors"
    assert (again.adapter / file).read_bytes() == (whole.adapter / file).read_bytes()


@pytest.mark.slow
def test_resumed_on_other_meshes(checkpoint, chats, tmp_path):
    """Rows of a step spread otherwise after each step, with the losses of one mesh throughout."""
    still = {"peft": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}}

    def run(folder, mesh, rows, accumulation) -> RunConfig:
        config = on(
            mesh, checkpoint, chats, tmp_path / folder, rows=rows, save_steps=1,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        return RunConfig.model_validate(config.model_dump() | still)

    train(run("whole", (1, 1, 1), 8, 1))
    killed_after_its_first_step(tmp_path / "whole", tmp_path / "parts")
    train(run("parts", (2, 2, 2), 4, 2), resume=True)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "3")
    train(run("parts", (1, 4, 1, 2), 8, 1), resume=True)
    losses = [
        [r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    with pytest.raises(UserError, match="a step had 8 rows .* set training.per_device_train_batch"):
        train(run("parts", (1, 1, 1), 2, 1), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["eva", "qera"])
def test_rows_cut_along_their_tokens(checkpoint, chats, tmp_path, start):
    """Starts that look at activations, and weights of four bits."""
    found = []
    for mesh in ((1, 1, 1, 1), (1, 2, 1, 2)):
        config = on(mesh, checkpoint, chats, tmp_path / str(mesh[3])).model_dump()
        config["peft"]["init_lora_weights"] = start
        if start == "qera":
            config["model"]["quantization"] = {"load_in_4bit": True}
        train(RunConfig.model_validate(config))
        found.append([r["loss"] for r in records(tmp_path / str(mesh[3])) if "loss" in r])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_start_that_is_kept_on_a_mesh(checkpoint, chats, tmp_path):
    """PiSSA's start stays frozen while A, which begins as the same array, is donated."""
    losses = []
    for mesh in ((1, 1, 1), (1, 2, 1)):
        config = on(mesh, checkpoint, chats, tmp_path / str(mesh[1]))
        update = {"init_lora_weights": "pissa", "use_dora": True, "lora_dropout": 0.0}
        config = config.model_copy(update={"peft": config.peft.model_copy(update=update)})
        train(config)
        losses.append([r["loss"] for r in records(tmp_path / str(mesh[1])) if "loss" in r])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_all_devices_where_no_mesh_is_named(checkpoint, chats, tmp_path, monkeypatch):
    """A CPU does not say how much memory it has: cut over all, which the run's config then says."""
    config = on((1, 1, 1), checkpoint, chats, tmp_path)
    unnamed = RunConfig.model_validate(config.model_dump() | {"mesh": {}})
    setup = set_up(unnamed)
    assert dict(setup.mesh.shape) == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert setup.config.mesh == MeshConfig(data=1, fsdp=8, sequence=1, tensor=1)
    assert "8 devices: data 1 x fsdp 8 x tensor 1" in setup.describe()
    monkeypatch.setattr("phi3_jax.training.setup.choose_axes", lambda *a: (8, 1, 1))
    swept = RunConfig.model_validate(unnamed.model_dump() | {"sweep": {"r": [2, 4]}})
    assert set_up(swept).config.mesh == MeshConfig(data=2, fsdp=1, sequence=1, tensor=1)


def test_refused(checkpoint, chats, tmp_path):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        set_up(on((16, 1, 1), checkpoint, chats, tmp_path, rows=16))
    config = on((4, 1, 1), checkpoint, chats, tmp_path)
    swept = RunConfig.model_validate(config.model_dump() | {"sweep": {"r": [2, 4]}})
    with pytest.raises(UserError, match="mesh.data: 4 is more than the sweep's members, 2"):
        set_up(swept)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1, 1), (2, 1, 1, 2)], ids=str)
def test_members_of_a_sweep_over_the_mesh(checkpoint, chats, tmp_path, sizes):
    """Three members over two groups of devices, one stopped: the runs alone, on one device."""
    config = on((1, sizes[1], 1), checkpoint, chats, tmp_path / "sweep", rows=2, eval_steps=3)
    lists = {"learning_rate": [1e-2, 1e-9, 3e-3], "stop": [1], "keep": 0.6}
    mesh = dict(zip(AXES, sizes, strict=True))
    swept = RunConfig.model_validate(config.model_dump() | {"sweep": lists, "mesh": mesh})
    result = train_sweep(swept)
    members = sweep_members(swept)
    assert result.stopped == {members[1].name: 1}
    for member in (members[0], members[2]):
        rows = swept.training.per_device_train_batch_size * sizes[1]
        update = {
            "output_dir": str(tmp_path / "alone" / member.name),
            "per_device_train_batch_size": rows,
            "per_device_eval_batch_size": rows,
            "learning_rate": member.config.training.learning_rate,
        }
        train(RunConfig.model_validate(config.model_dump() | {
            "mesh": {"data": 1}, "training": config.training.model_dump() | update,
        }))  # fmt: skip
        ours, theirs = (
            [(r.get("loss"), r.get("eval_loss")) for r in records(tmp_path / where / member.name)]
            for where in ("sweep", "alone")
        )
        # The member was also evaluated where others stopped.
        losses = [[a for a, _ in each if a is not None] for each in (ours, theirs)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
        assert ours[-1][1] == pytest.approx(theirs[-1][1], rel=1e-5)
