"""`phi3-jax suggest --find-lr`: rates compared by short runs, as separate runs would compare."""

from __future__ import annotations

import math

import pytest

from phi3_jax import UserError
from phi3_jax.cli import suggest as suggest_command
from phi3_jax.cli.main import main
from phi3_jax.cli.suggest import table
from phi3_jax.config.loader import load_config
from phi3_jax.planning import fit as fit_module
from phi3_jax.planning.find_lr import FoundRate, find_lr, rates_around, search_overrides
from phi3_jax.training.loop import train
from tests.phi3_jax.conftest import make_config, write_config
from tests.phi3_jax.planning.test_suggest import planned

SMALL = {"max_length": 64, "pad_to_multiple_of": 64}


@pytest.mark.parametrize(
    ("rate", "count", "expected"),
    [
        (4e-4, 5, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),
        (8e-4, 3, [3e-4, 1e-3, 3e-3]),
        (1e-5, 2, [3e-6, 1e-5]),
    ],
)
def test_rates_in_half_decades(rate, count, expected):
    assert rates_around(rate, count) == pytest.approx(expected)


def test_the_edge_is_reported():
    found = FoundRate({1e-4: 3.0, 3e-4: 2.5, 1e-3: 2.0}, best=1e-3, steps=20)
    assert found.edge == "highest"
    assert table(found) == [
        "learning rates by held-out loss after 20 steps:",
        "  1e-4  3.0000",
        "  3e-4  2.5000",
        "  1e-3  2.0000  best",
        "the best is the highest of them, so a better one may be further out: compare with "
        "--rates 3e-3,1e-2,3e-2",
    ]
    assert FoundRate({1e-4: 2.0, 3e-4: 2.5}, 1e-4, 20).edge == "lowest"
    middle = FoundRate({1e-4: 3.0, 3e-4: 2.0, 1e-3: math.nan}, 3e-4, 20)
    assert middle.edge is None and table(middle)[-1] == "  1e-3  nan"
    halved = FoundRate({1e-4: 2.0, 3e-4: 2.5, 1e-3: math.nan}, 1e-4, 20, {1e-3: 8})
    assert table(halved)[3] == "  1e-3  in the worse half after 8 steps"


@pytest.mark.slow
def test_the_losses_are_those_of_separate_runs(checkpoint, chats, tmp_path, capsys):
    """Over a config without held-out rows."""
    config = make_config(checkpoint, chats, tmp_path / "run", SMALL)
    file, rates = write_config(config, tmp_path / "run.yaml"), [1e-9, 1e-4, 1e-2]
    found = find_lr(file, [], rates, steps=3)
    assert found.best == 1e-2 and list(found.losses) == rates and found.edge == "highest"
    assert found.stopped == {1e-9: 2} and math.isnan(found.losses[1e-9])
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    # Nothing that is gone when it is read: the folder of the search is a temporary one.
    assert "step 3/3" in shown and "adapter:" not in shown and "temporary-find-lr" not in shown
    own = [
        *search_overrides(config, rates, 3, {"data": 1}),
        "sweep.learning_rate=[]",
        "sweep.stop=[]",
    ]
    own += ["training.learning_rate=1e-2", f"training.output_dir={tmp_path / 'alone'}"]
    alone = train(load_config(file, own)).evaluations[3]["eval_loss"]
    assert found.losses[1e-2] == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
def test_several_devices_have_the_batch_of_the_run(checkpoint, chats, tmp_path):
    """Each rate trains on the rows that the run takes at once, and a stage may be longer."""
    stages = {"num_decay_steps": 500, "min_lr_ratio": 0.5}
    config = make_config(
        checkpoint, chats, tmp_path / "run", SMALL,
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=stages, max_steps=1000,
    )  # fmt: skip
    plain = config.peft.model_copy(update={"lora_dropout": 0.0})  # masks depend on the micro-batch
    config = config.model_copy(update={"mesh": type(config.mesh)(data=2), "peft": plain})
    file, rates = write_config(config, tmp_path / "run.yaml"), [1e-4, 1e-2]
    pushing = ["training.push_to_hub=true", "training.hub_model_id=a/b", "training.save_steps=2"]
    found = find_lr(file, [*pushing, "training.hub_strategy=every_save"], rates, steps=2)
    own = [*search_overrides(config, rates, 2, {"data": 1}), "sweep.learning_rate=[]"]
    own += ["mesh.data=2", "training.learning_rate=1e-2"]
    alone = train(load_config(file, [*own, f"training.output_dir={tmp_path / 'alone'}"]))
    assert found.losses[1e-2] == pytest.approx(alone.evaluations[2]["eval_loss"], abs=1e-5)


def test_the_best_rate_becomes_the_config(checkpoint, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit_module, "plan", lambda *_: planned("cpu:1", 2, 1.0))
    given = []

    def found(path, overrides, rates, steps) -> FoundRate:
        given.append((load_config(path, overrides), rates, steps))
        print("progress")
        return FoundRate({1e-4: 3.0, 3e-4: 2.0, 1e-3: 2.5}, 3e-4, steps)

    monkeypatch.setattr(suggest_command, "find_lr", found)
    config = make_config(checkpoint, chats, tmp_path / "run", SMALL)
    file = write_config(config, tmp_path / "run.yaml")
    arguments = [
        "suggest",
        "--config",
        str(file),
        "--find-lr",
        "--rates",
        "1e-3,1e-4",
        "--steps",
        "7",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == "progress\n"  # stdout is the config
    (tmp_path / "best.yaml").write_text(shown.out)
    best = load_config(tmp_path / "best.yaml")
    assert best.training.learning_rate == 3e-4 and not best.sweep.values
    assert best.training.max_steps == config.training.max_steps
    assert "#   3e-4  2.0000  best" in shown.out
    # The rates are compared with the other suggestions applied.
    ((compared, rates, steps),) = given
    assert rates == [1e-4, 1e-3] and steps == 7
    assert compared.data.max_length == best.data.max_length > SMALL["max_length"]


def test_a_sweep_of_its_own_is_refused(checkpoint, chats, tmp_path):
    config = make_config(checkpoint, chats, tmp_path / "run", SMALL)
    file = write_config(config, tmp_path / "run.yaml")
    with pytest.raises(UserError, match="a sweep of its own"):
        find_lr(file, ["sweep.r=[2,4]"], [1e-3, 1e-2])


def test_what_a_sweep_cannot_train_is_said_by_its_key(checkpoint, chats, tmp_path):
    config = make_config(checkpoint, chats, tmp_path / "run", SMALL)
    file = write_config(config, tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"peft.init_lora_weights: eva"):
        find_lr(file, ["peft.init_lora_weights=eva"], [1e-3, 1e-2])
