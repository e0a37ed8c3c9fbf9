"""Checkpoints: where a run starts, and damage of every kind."""

from __future__ import annotations

import errno
import random
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax import UserError
from phi3_jax.training import state_files
from phi3_jax.training.checkpoints import Checkpoints, saved_choices
from phi3_jax.training.state_files import Damaged, read_record, rewrite_record, saved_steps
from phi3_jax.training.step import TrainState
from tests.phi3_jax.training.saved import IDENTITY, change_record, saved, scale_an_array, state_of


def test_new_runs_start_at_0_and_resumed_ones_at_the_last_checkpoint(tmp_path):
    fresh = state_of(0.0)
    assert saved(tmp_path, 2, 4).start(fresh, resume=False, fall_back=False) == (0, fresh)
    step, state = saved(tmp_path).start(fresh, resume=True, fall_back=False)
    assert step == 4
    np.testing.assert_array_equal(state.trainable["lora_A"][...], np.full((2, 3), 4.0))
    np.testing.assert_array_equal(state.opt_state["mu"], np.full((2, 3), -4.0))


def test_another_run_is_refused(tmp_path):
    saved(tmp_path, 1)
    other = saved(tmp_path, identity=IDENTITY | {"base": "x", "settings": {"training.seed": 2}})
    other.start(state_of(0.0), resume=False, fall_back=True)
    with pytest.raises(UserError, match=r"different base model; training.seed was 1 and is now"):
        other.start(state_of(0.0), resume=True, fall_back=True)


@pytest.mark.parametrize(
    ("rows", "fit"),
    [
        ([4, 1, 2], ""),
        ([2, 1, 1], "per_device_train_batch_size=2 and training.gradient_accumulation_steps=4"),
        ([16, 1, 4], "per_device_train_batch_size=2 and training.gradient_accumulation_steps=4"),
        ([3, 2, 3], "per_device_train_batch_size=1 and training.gradient_accumulation_steps=4"),
        ([1, 3, 1], "data x fsdp of one of 1, 2, 4, 8"),
    ],
)
def test_the_rows_of_a_step_may_be_spread_otherwise(tmp_path, rows, fit):
    saved(tmp_path, 1)
    other = saved(tmp_path, identity=IDENTITY | {"rows": rows})
    if not fit:
        assert other.start(state_of(0.0), True, False)[0] == 1
        return
    with pytest.raises(UserError, match=f"a step had 8 rows .* 2 x 4 x 1.*{fit}"):
        other.start(state_of(0.0), True, False)


def test_what_auto_chose_is_kept_and_never_a_reason_to_refuse(tmp_path):
    saved(tmp_path, 1)
    assert saved_choices(tmp_path) == {"attn": "splash"}
    assert saved_choices(tmp_path / "absent") == {}
    other = IDENTITY | {"choices": {"attn": "xla"}}
    assert saved(tmp_path, identity=other).start(state_of(0.0), True, False)[0] == 1
    named = saved(tmp_path, identity=other | {"asked": {"attn": "xla"}})
    with pytest.raises(UserError, match="model.attn was 'splash' and is 'xla'"):
        named.start(state_of(0.0), True, False)


def test_a_run_is_extended_before_a_step_of_the_extension(tmp_path):
    saved(tmp_path, 4)
    longer = saved(tmp_path, identity=IDENTITY | {"extend": 3})
    assert longer.start(state_of(0.0), True, False)[0] == 4
    longer.save(5, state_of(5.0), {})
    longer.wait()
    for extend in (None, 9):
        with pytest.raises(UserError, match="extend was 3 and is now .* 5 is one of the added"):
            saved(tmp_path, identity=IDENTITY | {"extend": extend}).start(state_of(0), True, False)


def test_other_held_out_rows_matter_where_they_choose_the_best(tmp_path):
    saved(tmp_path, 1)
    other = IDENTITY | {"held_out": "x"}
    assert saved(tmp_path, identity=other).start(state_of(0.0), True, False)[0] == 1
    choosing = saved(tmp_path, identity=other | {"chooses_best": True})
    with pytest.raises(UserError, match="evaluated on different held-out rows"):
        choosing.start(state_of(0.0), True, False)


def test_other_held_out_rows_are_named_where_a_stream_leaves_them_out(tmp_path):
    streamed = IDENTITY | {"settings": {"data.streaming": True}}
    saved(tmp_path, 1, identity=streamed)
    other = streamed | {"held_out": "x"}  # packed otherwise
    assert saved(tmp_path, identity=other).start(state_of(0.0), True, False)[0] == 1
    for held_out, reason in (("x", ", for a stream leaves out the held-out rows"), ("h", ". Rest")):
        now = saved(tmp_path, identity=streamed | {"data": "other", "held_out": held_out})
        with pytest.raises(UserError, match=f"trained on different training data{reason}"):
            now.start(state_of(0.0), True, False)


def test_every_flipped_bit_and_torn_write_is_found_or_harmless(tmp_path):
    """Whatever byte of whatever file of a checkpoint changes or is lost: never another number."""
    saved(tmp_path / "sound", 1, 2)
    files = [f for f in sorted((tmp_path / "sound" / "2").rglob("*")) if f.is_file()]
    dice, found = random.Random(0), 0
    for number in range(25):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", folder)
        file = folder / dice.choice(files).relative_to(tmp_path / "sound")
        data = bytearray(file.read_bytes())
        position = dice.randrange(len(data))
        if number % 3:
            data[position] ^= 1 << dice.randrange(8)
        else:
            del data[position:]
        file.write_bytes(data)
        step, state = saved(folder).start(state_of(0.0), resume=True, fall_back=True)
        np.testing.assert_array_equal(state.trainable["lora_A"][...], np.full((2, 3), step))
        np.testing.assert_array_equal(state.opt_state["mu"], np.full((2, 3), -step))
        found += step == 1
    assert found > 3


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (scale_an_array, "the array '00000 .*lora_A.*' differs from its digest"),
        (lambda folder: shutil.rmtree(folder / "state"), "the arrays '00000 .*', '00001 .*mu'"),
        (lambda folder: (folder / "run" / "metadata").unlink(), "run/metadata"),
        (lambda folder: (folder / "run" / "metadata").write_text("[" * 100_000), "run/metadata"),
        (lambda folder: (folder / "run" / "metadata").write_text("[]"), "run/metadata"),
        (lambda folder: change_record(folder, metrics={"eval_loss": 0.1}), "run/metadata differs"),
        (lambda folder: folder.rename(folder.with_name("9")), "it holds step 6"),
    ],
)
def test_damage_is_named_and_the_one_before_is_offered(tmp_path, capsys, damage, problem):
    saved(tmp_path, 3, 6)
    damage(tmp_path / "6")
    last = saved_steps(tmp_path)[-1]
    where = rf"{tmp_path}/{last}: damaged, .*{problem}.*checkpoint of step 3 before it is sound"
    with pytest.raises(UserError, match=where):
        saved(tmp_path).start(state_of(0.0), resume=True, fall_back=False)
    step, state = saved(tmp_path).start(state_of(0.0), resume=True, fall_back=True)
    assert step == 3 and state.opt_state["mu"][0, 0] == -3
    assert f"warning: {tmp_path}/{last}: damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", f"{last}.damaged"]


def test_a_run_whose_only_checkpoint_is_damaged(tmp_path):
    saved(tmp_path, 3)
    shutil.rmtree(tmp_path / "3" / "state")
    with pytest.raises(UserError, match="no other checkpoint: pass --resume=auto to start again"):
        saved(tmp_path).start(state_of(0.0), resume=True, fall_back=False)
    fresh = state_of(0.0)
    assert saved(tmp_path).start(fresh, resume=True, fall_back=True) == (0, fresh)


def test_a_state_that_is_not_finite_is_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, IDENTITY, None)
    checkpoints.save(1, state_of(float("nan")), {})
    with pytest.raises(Damaged, match="not finite"):
        checkpoints.restore(1, state_of(0.0))


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """Where it fails in the background, the next save says so, or the end of the run."""
    checkpoints = saved(tmp_path, 1)

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: ...: No space left on device")

    said = rf"{tmp_path}/2: .* disk is full: free some space, .*--resume .*step 1 is intact"
    for owner, name in (
        (ocp.AsyncCheckpointer, "save"),
        (ocp.AsyncCheckpointer, "wait_until_finished"),
        (state_files, "_sync"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            checkpoints.save(2, state_of(2.0), {})
            with pytest.raises(UserError, match=said):
                checkpoints.save(3, state_of(3.0), {})
            assert [path.name for path in tmp_path.iterdir()] == ["1"]
            with pytest.raises(UserError, match=said), checkpoints:
                checkpoints.save(2, state_of(2.0), {})
    assert saved(tmp_path, 2).latest() == 2


def test_an_error_of_the_run_is_not_replaced(tmp_path, monkeypatch, capsys):
    checkpoints = Checkpoints(tmp_path, IDENTITY, None)
    monkeypatch.setattr(state_files, "_sync", lambda folder: 1 / 0)
    with pytest.raises(RuntimeError, match="of the run"), checkpoints:
        checkpoints.save(2, state_of(2.0), {})
        raise RuntimeError("of the run")
    assert "warning: " in (said := capsys.readouterr().err) and "ZeroDivisionError" in said


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """And what the next steps do to the arrays does not reach it."""
    go_on, real = threading.Event(), ocp.AsyncCheckpointer.wait_until_finished

    def wait_until_finished(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert go_on.wait(60)
        real(self)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", wait_until_finished)
    checkpoints, state = Checkpoints(tmp_path, IDENTITY, None), state_of(1.0)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = step(state)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = step(state)
    assert state.opt_state["mu"][0, 0] == 3 and saved_steps(tmp_path) == []
    go_on.set()
    checkpoints.wait()
    restored = saved(tmp_path).restore(1, state_of(0.0))
    np.testing.assert_array_equal(restored.trainable["lora_A"][...], np.full((2, 3), 2.0))
    np.testing.assert_array_equal(restored.opt_state["mu"], np.zeros((2, 3)))


@pytest.mark.parametrize("spec", [("x", "y"), ("y", None), (None, "x"), (None, None)], ids=str)
def test_any_mesh_reads_what_another_wrote(tmp_path, spec):
    """Each device gets its block, with the same digests, none of which names a mesh."""
    numbers = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    written, read = jax.make_mesh((4, 2), ("x", "y")), jax.make_mesh((2, 2), ("x", "y"))

    def spread(mesh, *axes):
        place = NamedSharding(mesh, P(*axes))
        leaf = jax.device_put(numbers, place)
        scalar = jax.device_put(np.int32(7), NamedSharding(mesh, P()))
        half = jax.device_put(numbers.astype(jnp.bfloat16), place)
        return TrainState(nnx.State({"A": nnx.LoRAParam(leaf)}), {"n": scalar, "half": half})

    checkpoints = Checkpoints(tmp_path, IDENTITY, None)
    checkpoints.save(1, spread(written, "x", "y"), {})
    checkpoints.save(2, spread(read, *spec), {})
    checkpoints.wait()
    records = [read_record(tmp_path, step)["arrays"] for step in (1, 2)]
    one, two = ({name: saved["digest"] for name, saved in record.items()} for record in records)
    assert one == two
    empty = jax.tree.map(jnp.zeros_like, spread(read, *spec))
    restored = checkpoints.restore(1, empty)
    np.testing.assert_array_equal(restored.trainable["A"][...], numbers)
    np.testing.assert_array_equal(restored.opt_state["half"], numbers.astype(jnp.bfloat16))
    assert restored.opt_state["n"] == 7
    for found, like in zip(jax.tree.leaves(restored), jax.tree.leaves(empty), strict=True):
        assert found.sharding == like.sharding


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path):
    checkpoints = saved(tmp_path, 3)
    record = read_record(tmp_path, 3)
    del record["format"]
    rewrite_record(tmp_path, 3, record)
    for fall_back in (False, True):
        with pytest.raises(UserError, match=r"format 1; this version reads format 2\). Finish"):
            checkpoints.start(state_of(0.0), resume=True, fall_back=fall_back)


def test_names_that_are_no_steps_are_left_alone(tmp_path):
    for name in ("007", "0", "-1", "\u00b2", "3.damaged", "4.orbax-checkpoint-tmp-1"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [] and saved_steps(tmp_path / "absent") == []


def test_errors_of_the_system_have_a_remedy():
    from phi3_jax.errors import storage_problem

    full = OSError(errno.ENOSPC, "No space left on device", "/runs/a")
    assert storage_problem(full) == "/runs/a: the disk is full: free some space"
    assert storage_problem(ConnectionRefusedError("no")) is None
    assert storage_problem(KeyError("x")) is None
