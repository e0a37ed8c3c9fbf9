"""A sweep: every member is the run that it would be alone."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

import phi3_jax
from phi3_jax import UserError
from phi3_jax.cli import main as cli
from phi3_jax.config.loader import load_config
from phi3_jax.config.sections import SweepConfig
from phi3_jax.data import batches
from phi3_jax.data.batches import Batches
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.interrupt import Interrupted
from phi3_jax.training.loop import train
from phi3_jax.training.progress import NonFiniteError
from phi3_jax.training.strategies import Strategies
from phi3_jax.training.sweep import export as export_module
from phi3_jax.training.sweep import groups, halving
from phi3_jax.training.sweep import run as run_module
from phi3_jax.training.sweep.members import sweep_members
from phi3_jax.training.sweep.progress import Sweep
from phi3_jax.training.sweep.run import train_sweep
from tests.phi3_jax.conftest import make_config, write_config

HELD_OUT = {"test_size": 3, "max_length": 64, "pad_to_multiple_of": 64}


def make_sweep(checkpoint, chats, output, lists, **training):
    config = make_config(checkpoint, chats, output, HELD_OUT, eval_steps=3, **training)
    return config.model_copy(update={"sweep": type(config.sweep)(**lists)})


def records(folder, key: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory):
    """Folder of a member's run by itself; two of the sweeps have the same members."""
    known = {}

    def run(member):
        unplaced = member.config.training.model_copy(update={"output_dir": ""})
        key = member.config.model_copy(update={"training": unplaced}).model_dump_json()
        if key not in known:
            known[key] = tmp_path_factory.mktemp("alone")
            training = unplaced.model_copy(update={"output_dir": str(known[key])})
            train(member.config.model_copy(update={"training": training}))
        return known[key]

    return run


@pytest.mark.parametrize(
    ("lists", "cpu_tokens"),
    [
        ({"learning_rate": [1e-2, 2e-3], "r": [2, 4]}, 10**6),
        ({"learning_rate": [1e-2, 2e-3], "r": [2, 4]}, 600),
        ({"seed": [1, 5], "lora_alpha": [4.0]}, 10**6),
    ],
    ids=["all at once", "some at once", "seeds"],
)
def test_each_member_is_the_run_alone(
    checkpoint, chats, tmp_path, monkeypatch, run_alone, lists, cpu_tokens
):
    """Losses of every step with dropout, held-out losses, the adapter."""
    monkeypatch.setattr(groups, "CPU_TOKENS", cpu_tokens)
    config = make_sweep(checkpoint, chats, tmp_path / "sweep", lists)
    if "seed" in lists:  # their batches are of unlike lengths in some steps
        data = config.data.model_copy(update={"max_length": 128})
        config = config.model_copy(update={"data": data})
    result = train_sweep(config)
    members = sweep_members(config)
    assert len(members) == np.prod([len(values) for values in lists.values()])
    for member in members:
        alone, folder = run_alone(member), tmp_path / "sweep" / member.name
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
    monkeypatch.setattr(run_module, "take_steps", sweeps.append)
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
    # A skipped step is counted, and does not advance the learning rate, as in the run alone.
    member = sweep_members(config)[0]
    alone = {"output_dir": str(tmp_path / "alone"), "on_nonfinite": "skip"}
    training = member.config.training.model_copy(update=alone)
    train(member.config.model_copy(update={"training": training}))
    for key in ("learning_rate", "skipped_steps"):
        theirs = records(tmp_path / "alone", key)
        assert records(tmp_path / member.name, key) == pytest.approx(theirs) and theirs


def test_a_finished_sweep_keeps_its_comparison(checkpoint, chats, tmp_path):
    """Without held-out rows the best is that of the last training losses, also when resumed."""
    config = make_config(checkpoint, chats, tmp_path, {"max_length": 64}, max_steps=2)
    config = config.model_copy(update={"sweep": type(config.sweep)(learning_rate=[1e-9, 1e-2])})
    whole = train_sweep(config)
    said = (tmp_path / "sweep.json").read_text()
    assert whole.best == "learning_rate=0.01" and "null" not in said
    again = train_sweep(config, resume=True)
    assert again.losses == whole.losses and (tmp_path / "sweep.json").read_text() == said


def test_epochs_of_unlike_lengths_are_refused(checkpoint, tmp_path):
    """Each seed draws other rows of a mixture, which packing fits into more or fewer."""
    sources = []
    for name, count in (("a", 6), ("b", 60)):
        file = tmp_path / f"{name}.jsonl"
        rows = [
            {"prompt": "tea?", "completion": "tea is good " * (8 if row % 4 == 0 else 1)}
            for row in range(count)
        ]
        file.write_text("\n".join(map(json.dumps, rows)))
        sources.append({"path": str(file), "weight": 1 if name == "a" else 2})
    data = {"path": None, "sources": sources, "packing": True, "max_length": 64}
    config = make_config(checkpoint, tmp_path, tmp_path / "run", data, max_steps=-1)
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    update = {"training": config.training.model_copy(update=training)}
    config = config.model_copy(update=update | {"sweep": type(config.sweep)(seed=[1, 2, 3, 4, 5])})
    with pytest.raises(UserError, match=r"sweep.seed: .* with seed 1, .* set training.max_steps"):
        train_sweep(config)


def test_members_whose_steps_were_all_skipped(checkpoint, chats, tmp_path, monkeypatch):
    config = make_sweep(checkpoint, chats, tmp_path, {"learning_rate": [1e-2, 1e-3]})
    counts = [np.array([0, 2]), np.array([0, 0])]
    monkeypatch.setattr(export_module, "update_counts", lambda state: counts.pop(0))
    result = train_sweep(config)
    assert list(result.adapters) == [result.best] == ["learning_rate=0.001"]
    (_, failed) = json.loads((tmp_path / "sweep.json").read_text())["members"]
    assert failed["adapter"] is None and failed["name"] == "learning_rate=0.01"
    assert not (tmp_path / "learning_rate=0.01" / "adapter").exists()
    with pytest.raises(NonFiniteError, match="steps of every member"):
        train_sweep(config, resume=True)


def test_no_two_members_share_a_folder(checkpoint, chats, tmp_path):
    """Six digits do not tell all seeds and rates apart."""
    lists = {"learning_rate": [1e-4, 1.2345678e-4, 1.2345679e-4], "seed": [7, 20261126, 20261127]}
    members = sweep_members(make_sweep(checkpoint, chats, tmp_path, lists, run_name="rates"))
    names = [member.name for member in members]
    assert [m.config.training.run_name for m in members] == [f"rates-{name}" for name in names]
    assert names[0] == "learning_rate=0.0001,seed=7" and len(set(names)) == 9
    for member in members:
        rate, seed = (float(part.split("=")[1]) for part in member.name.split(","))
        assert (rate, seed) == (member.config.training.learning_rate, member.config.training.seed)


def test_members_of_one_shape_are_grouped(monkeypatch):
    monkeypatch.setattr(groups, "CPU_TOKENS", 40)
    short, long = ({"tokens": np.zeros((1, 2, length), np.int32)} for length in (5, 8))
    found = groups.grouped([0, 2, 3, 4, 7], [short, long, short, dict(short), short])
    assert [group.members for group in found] == [[0, 3, 4, 7], [2]]
    assert found[0].batch["tokens"].shape == (4, 1, 2, 5)  # not all of them share it
    assert found[1].batch is long
    assert [g.members for g in groups.grouped([0, 1, 2], [long] * 3)] == [[0, 1], [2]]
    assert [g.members for g in groups.grouped([0, 1, 2], [long] * 3, devices=2)] == [[0, 1, 2]]


def test_who_goes_on():
    """The better half, rounded up, of those that were left; a loss that is not finite is last."""
    sweep = SweepConfig(r=[1, 2, 3, 4, 5], stop=[2, 4])
    after_2, after_4 = [3.0, 1.0, math.nan, 2.0, 2.5], [None, 0.5, None, 0.6, 0.4]
    known: list = [{0: {"eval_loss": 9.0}, 2: {"eval_loss": loss}} for loss in after_2]
    names = list("abcde")
    assert halving.stopped_after(sweep, names, known, 1) == {}
    assert halving.stopped_after(sweep, names, known, 3) == {0: 2, 2: 2}
    assert halving.stopped_after(sweep, names, known, 4) == {0: 2, 2: 2}  # not evaluated yet
    with pytest.raises(UserError, match="held-out loss of b after step 4 is not in"):
        halving.stopped_after(sweep, names, known, 5)
    for index, loss in enumerate(after_4):
        known[index] |= {} if loss is None else {4: {"eval_loss": loss}}
    assert halving.stopped_after(sweep, names, known, 6) == {0: 2, 2: 2, 3: 4}
    assert [halving.kept(n, 0.5) for n in (1, 2, 3, 8)] == [1, 1, 2, 4]
    assert halving.kept(30, 0.1) == 3


def test_the_last_step_of_members_that_stop_is_logged():
    sweep = object.__new__(Sweep)
    sweep.when, sweep.total_steps = Strategies(3, None, None, False), 7
    sweep.sweep = SweepConfig(r=[1, 2], stop=[4])
    assert [step for step in range(1, 8) if sweep.is_logged(step)] == [1, 3, 4, 6, 7]


@pytest.mark.slow
def test_survivors_are_the_runs_alone(checkpoint, chats, tmp_path, monkeypatch):
    """Through two halvings and an interruption; who stopped has no more records, and no adapter."""
    lists = {"learning_rate": [1e-2, 1e-9, 3e-3, 1e-8], "stop": [2, 4]}
    monkeypatch.setattr(groups, "CPU_TOKENS", 1)
    config = make_sweep(checkpoint, chats, tmp_path / "sweep", lists, save_steps=4)
    save, names = Checkpoints.save, [member.name for member in sweep_members(config)]

    def stop(self, step, state, loss):
        save(self, step, state, loss)
        raise Interrupted(15, step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Interrupted):
            train_sweep(config)
    fewer = config.data.model_copy(update={"max_test_samples": 1})
    with pytest.raises(UserError, match="evaluated on different held-out rows"):
        train_sweep(config.model_copy(update={"data": fewer}), resume=True)
    result = train_sweep(config, resume=True)
    assert list(result.adapters) == [result.best] and result.best in (names[0], names[2])
    other = names[2] if result.best == names[0] else names[0]
    assert result.stopped == {names[1]: 2, names[3]: 2, other: 4}
    for name, last in ({result.best: 6} | result.stopped).items():
        assert max(records(tmp_path / "sweep" / name, "loss")) == last
        assert (tmp_path / "sweep" / name / "adapter").exists() == (last == 6)
    best = next(m for m in sweep_members(config) if m.name == result.best)
    training = best.config.training.model_copy(update={"output_dir": str(tmp_path / "alone")})
    train(best.config.model_copy(update={"training": training}))
    ours, theirs = (
        records(where, "loss") for where in (tmp_path / "sweep" / best.name, tmp_path / "alone")
    )
    assert ours == pytest.approx(theirs, abs=1e-5)
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["members"]
    assert [row.get("stopped") for row in rows].count(2) == 2 and rows[0]["name"] == best.name


def test_command_line(checkpoint, chats, tmp_path, capsys):
    config = make_config(checkpoint, chats, tmp_path / "run", HELD_OUT, max_steps=2)
    file = write_config(config, tmp_path / "config.yaml")
    arguments = ["--config", str(file), "sweep.learning_rate=[1e-2, 1e-3]"]
    assert cli.main(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert "2 adapters at once: learning_rate=0.01; learning_rate=0.001" in out
    assert "best  eval_loss" in out
    assert cli.main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert "evaluate one with its own config" in said and "run/MEMBER/config.yaml" in said
    model = phi3_jax.load(checkpoint)
    import lora_flax

    lora_flax.load_peft(model, tmp_path / "run" / "learning_rate=0.01" / "adapter")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.learning_rate=[1e-4, 1e-4]", "duplicate value in"),
        ("sweep.r=[0]", "sweep.r"),
        ("sweep.rank=[4]", "unknown key"),
        ("sweep.stop=[3]", "there are no members"),
        ("sweep.learning_rate=1e-4", "sweep.learning_rate"),
    ],
)
def test_bad_lists(checkpoint, chats, tmp_path, override, said):
    config = make_config(checkpoint, chats, tmp_path / "run")
    file = write_config(config, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=said):
        load_config(file, [override])
