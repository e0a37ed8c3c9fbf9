"""A sweep: every member is the run that it would be alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import phi3_jax
from phi3_jax import UserError
from phi3_jax.cli import main as cli
from phi3_jax.config.loader import load_config
from phi3_jax.data import batches
from phi3_jax.data.batches import Batches
from phi3_jax.training import step as step_module
from phi3_jax.training import sweep as sweep_module
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.loop import train
from phi3_jax.training.members import sweep_members
from phi3_jax.training.progress import NonFiniteError
from phi3_jax.training.sweep import train_sweep
from tests.phi3_jax.conftest import make_config, write_config

HELD_OUT = {"test_size": 3, "max_length": 64, "pad_to_multiple_of": 64}


def make_sweep(checkpoint, chats, output, lists, **training):
    config = make_config(checkpoint, chats, output, HELD_OUT, eval_steps=3, **training)
    return config.model_copy(update={"sweep": type(config.sweep)(**lists)})


def records(folder, key: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize(
    ("lists", "cpu_tokens"),
    [
        ({"learning_rate": [1e-2, 2e-3], "r": [2, 4]}, 10**6),
        ({"learning_rate": [1e-2, 2e-3], "r": [2, 4]}, 600),
        ({"seed": [1, 5], "lora_alpha": [4.0]}, 1),
    ],
    ids=["all at once", "some at once", "seeds one by one"],
)
def test_each_member_is_the_run_alone(checkpoint, chats, tmp_path, monkeypatch, lists, cpu_tokens):
    """Losses of every step, held-out losses, the adapter, with dropout."""
    monkeypatch.setattr(step_module, "CPU_TOKENS", cpu_tokens)
    config = make_sweep(checkpoint, chats, tmp_path / "sweep", lists)
    if "seed" in lists:
        # Other seeds have other batches, here of other lengths.
        data = config.data.model_copy(update={"max_length": 128})
        config = config.model_copy(update={"data": data})
    result = train_sweep(config)
    members = sweep_members(config)
    assert len(members) == np.prod([len(values) for values in lists.values()])
    for member in members:
        alone = tmp_path / "alone" / member.name
        training = member.config.training.model_copy(update={"output_dir": str(alone)})
        train(member.config.model_copy(update={"training": training}))
        folder = tmp_path / "sweep" / member.name
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "mean_token_accuracy"):
            ours, theirs = records(folder, key), records(alone, key)
            assert ours.keys() == theirs.keys() and ours
            for step, value in theirs.items():
                assert ours[step] == pytest.approx(value, abs=1e-5, rel=1e-4), (key, step)
        ours, theirs = (
            load_file(where / "adapter" / "adapter_model.safetensors") for where in (folder, alone)
        )
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-2, atol=1e-3, err_msg=name)
        assert result.losses[member.name] == pytest.approx(records(alone, "eval_loss")[6], abs=1e-5)
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert summary["best"] == result.best == min(result.losses, key=result.losses.__getitem__)
    assert [row["name"] for row in summary["members"]][0] == result.best


def test_one_member_has_the_batches_and_evaluations_of_the_run(
    checkpoint, chats, tmp_path, monkeypatch
):
    """The rows are equal bit for bit; the evaluations differ by a vmapped program's rounding."""
    built: dict[str, list[bytes]] = {}

    def record(batch):
        built[now].append(b"".join(batch[name].tobytes() for name in sorted(batch)))
        return batch

    get, evaluated = Batches.__getitem__, batches.eval_batches
    monkeypatch.setattr(Batches, "__getitem__", lambda self, step: record(get(self, step)))
    monkeypatch.setattr(batches, "eval_batches", lambda *args: map(record, evaluated(*args)))
    config = make_sweep(checkpoint, chats, tmp_path / "sweep", {"r": [4]}, max_steps=3)
    (member,) = sweep_members(config)
    training = member.config.training.model_copy(update={"output_dir": str(tmp_path / "alone")})
    alone = member.config.model_copy(update={"training": training})
    for now, function, own in (("sweep", train_sweep, config), ("run", train, alone)):
        built[now] = []
        function(own)
    assert built["sweep"] == built["run"]
    for key in ("eval_loss", "eval_perplexity", "eval_mean_token_accuracy"):
        ours = records(tmp_path / "sweep" / member.name, key)
        theirs = records(tmp_path / "alone", key)
        assert list(ours) == list(theirs) == [0, 3]
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_compiled_once_a_shape(checkpoint, chats, tmp_path, monkeypatch):
    config = make_sweep(checkpoint, chats, tmp_path, {"r": [2, 4]})
    packed = config.model_copy(update={"data": config.data.model_copy(update={"packing": True})})
    sweeps = []
    monkeypatch.setattr(sweep_module, "take_steps", sweeps.append)
    train_sweep(packed)
    (sweep,) = sweeps
    shapes = {sweep.batches[1][step]["tokens"].shape for step in range(2)}
    for _ in range(2):
        sweep.start_step()
    assert sweep.train_step._cache_size() == len(shapes)


def test_a_stopped_sweep_goes_on_with_the_same_bytes(checkpoint, chats, tmp_path, monkeypatch):
    lists = {"learning_rate": [1e-2, 1e-3]}
    whole = train_sweep(make_sweep(checkpoint, chats, tmp_path / "whole", lists))
    config = make_sweep(checkpoint, chats, tmp_path / "cut", lists)
    save = Checkpoints.save

    def stop(self, step, state, loss):
        save(self, step, state, loss)
        raise Interrupted(15, step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Interrupted):
            train_sweep(config)
    with pytest.raises(UserError, match="pass --resume"):
        train_sweep(config)
    other = config.model_copy(update={"sweep": type(config.sweep)(learning_rate=[1e-2, 5e-3])})
    with pytest.raises(UserError, match=r"sweep.learning_rate was \[0.01, 0.001\]"):
        train_sweep(other, resume=True)
    cut = train_sweep(config, resume=True)
    assert cut.losses == whole.losses and cut.best == whole.best
    for name, adapter in cut.adapters.items():
        ours = (adapter / "adapter_model.safetensors").read_bytes()
        assert ours == (whole.adapters[name] / "adapter_model.safetensors").read_bytes()
        folder = tmp_path / "cut" / name
        assert records(folder, "loss") == records(tmp_path / "whole" / name, "loss")


def test_a_member_that_blows_up_does_not_stop_the_others(checkpoint, chats, tmp_path):
    lists = {"learning_rate": [1e30, 1e-3]}
    config = make_sweep(checkpoint, chats, tmp_path, lists, max_grad_norm=0.0)
    result = train_sweep(config)
    assert result.best == "learning_rate=0.001"
    for adapter in result.adapters.values():
        assert all(
            np.isfinite(t).all() for t in load_file(adapter / "adapter_model.safetensors").values()
        )


def test_members_whose_steps_were_all_skipped(checkpoint, chats, tmp_path, monkeypatch):
    config = make_sweep(checkpoint, chats, tmp_path, {"learning_rate": [1e-2, 1e-3]})
    counts = [np.array([0, 2]), np.array([0, 0])]
    monkeypatch.setattr(sweep_module, "update_counts", lambda state: counts.pop(0))
    result = train_sweep(config)
    assert list(result.adapters) == [result.best] == ["learning_rate=0.001"]
    (_, failed) = json.loads((tmp_path / "sweep.json").read_text())["members"]
    assert failed["adapter"] is None and failed["name"] == "learning_rate=0.01"
    assert not (tmp_path / "learning_rate=0.01" / "adapter").exists()
    with pytest.raises(NonFiniteError, match="steps of every member"):
        train_sweep(config, resume=True)


def test_command_line(checkpoint, chats, tmp_path, capsys):
    config = make_config(checkpoint, chats, tmp_path / "run", HELD_OUT, max_steps=2)
    file = write_config(config, tmp_path / "config.yaml")
    arguments = ["--config", str(file), "sweep.learning_rate=[1e-2, 1e-3]"]
    assert cli.main(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert "2 adapters at once: learning_rate=0.01; learning_rate=0.001" in out
    assert "best  eval_loss" in out
    model = phi3_jax.load(checkpoint)
    import lora_flax

    lora_flax.load_peft(model, tmp_path / "run" / "learning_rate=0.01" / "adapter")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.learning_rate=[1e-4, 1e-4]", "duplicate value in"),
        ("sweep.r=[0]", "sweep.r"),
        ("sweep.rank=[4]", "unknown key"),
        ("sweep.learning_rate=1e-4", "sweep.learning_rate"),
    ],
)
def test_bad_lists(checkpoint, chats, tmp_path, override, said):
    config = make_config(checkpoint, chats, tmp_path / "run")
    file = write_config(config, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=said):
        load_config(file, [override])
