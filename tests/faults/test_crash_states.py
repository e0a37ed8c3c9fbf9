"""Every state in which a crash can leave what a command writes is one that the next gets out of."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint.checkpoint import Checkpoint
from phi3_jax.config.loader import DataConfig, load_config
from phi3_jax.data.dataset import load_examples
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.metrics import open_metrics, read_evaluations
from phi3_jax.training.output import open_output
from tests.faults.boundaries import IDENTITY, Sound, state_of
from tests.faults.inputs import ROWS
from tests.faults.recorder import states_of, with_torn


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> list[Path]:
    run = tmp_path_factory.mktemp("runs") / "run"

    def save() -> None:
        with open_output(str(run), resume=False) as opened:
            checkpoints = Checkpoints(opened.checkpoints, IDENTITY, 1, opened)
            for step, loss in ((2, 1.0), (4, None), (4, 3.0), (6, 2.0), (8, 0.5)):
                metrics = {} if loss is None else {"eval_loss": loss}
                checkpoints.save(step, state_of(step), metrics)
                checkpoints.wait()

    return states_of(run, save)


def start_again(run: Path) -> int:
    """The step from which `--resume=auto` continues; its arrays are those of that step."""
    with open_output(str(run), resume="auto") as opened:
        checkpoints = Checkpoints(opened.checkpoints, IDENTITY, 1, opened)
        step, state = checkpoints.start(state_of(0), opened.resume, opened.fall_back)
        np.testing.assert_array_equal(state.trainable["lora_A"][...], np.full((2, 3), step))
        np.testing.assert_array_equal(state.opt_state["mu"], np.full((2, 3), -step))
        left = {path.name for path in run.rglob("*") if "tmp" in path.name}
        assert not left
        checkpoints.save(10, state_of(10), {"eval_loss": 0.1})  # and the run continues
        assert checkpoints.latest() == 10
    return step


def test_killed_before_every_operation(states, tmp_path):
    """Never back by more than the save that was under way, and never in doubt about the numbers."""
    steps = []
    for number, state in enumerate(states):
        run = tmp_path / str(number)
        shutil.copytree(state, run)
        steps.append(start_again(run))
    assert len(states) > 20 and steps == sorted(steps)
    assert set(steps) == {0, 2, 4, 6, 8}


def test_power_lost_at_every_save(states, tmp_path):
    """One file of each state is cut short: an earlier checkpoint is taken, or the start."""
    dice = random.Random(0)
    for number, state in enumerate(states[::3]):
        run = tmp_path / str(number)
        shutil.copytree(state, run)
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
        if files:
            file = dice.choice(files)
            file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])
        assert start_again(run) in (0, 2, 4, 6, 8)


def adapter_of(sound: Sound, value: float, alpha: float) -> lora_flax.PeftAdapter:
    """An adapter that changes the model by that value."""
    model = nnx.clone(sound.model)
    config = lora_flax.LoraConfig(r=1, lora_alpha=alpha, target_modules=["o_proj"])
    lora_flax.wrap(model, config, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: np.full_like(leaf, value), state))
    return lora_flax.to_peft(model, base_model_name_or_path="base")


def change_by(sound: Sound, folder: Path) -> float:
    """What an adapter adds to a weight of the model."""
    model = nnx.clone(sound.model)
    lora_flax.load_peft(model, folder)
    before = sound.model.model.layers.self_attn.o_proj.kernel[...]
    lora_flax.merge_and_unload(model)
    return float((model.model.layers.self_attn.o_proj.kernel[...] - before)[0, 0, 0])


def test_an_adapter_over_another(sound, tmp_path):
    """It is the old one, the new one, or none; never the weights of one with the other's scale."""
    first, second = adapter_of(sound, 0.1, 1.0), adapter_of(sound, 0.2, 4.0)
    folder = tmp_path / "adapter"
    states = states_of(folder, lambda: (first.save(folder), second.save(folder)))
    found = []
    for state, torn in with_torn(states, random.Random(0)):
        try:
            found.append(round(change_by(sound, state), 4))
        except lora_flax.LoraError:
            assert torn or not (state / "adapter_config.json").exists()
    assert len(states) > 8 and set(found) == {0.01, 0.16}


def test_a_model_over_another(sound, tmp_path):
    """Shards of one model are never taken for those of the other."""
    other = nnx.clone(sound.model)
    nnx.update(other, jax.tree.map(lambda leaf: leaf + 1, nnx.state(other)))
    folder = tmp_path / "model"

    def save() -> None:
        phi3_jax.save(sound.model, folder, max_shard_size=9000)
        phi3_jax.save(other, folder, max_shard_size=9000)
        phi3_jax.save(sound.model, folder)

    expected = [jax.tree.leaves(nnx.state(model)) for model in (sound.model, other)]
    states, loaded = states_of(folder, save), set()
    for state, torn in with_torn(states, random.Random(0)):
        try:
            found = jax.tree.leaves(nnx.state(Checkpoint.open(state).load()))
        except UserError:
            assert torn or not (state / "config.json").exists()
            continue
        equal = [all(map(np.array_equal, found, leaves)) for leaves in expected]
        assert any(equal)
        loaded.add(equal.index(True))
    assert loaded == {0, 1} and len(list(folder.glob("*.safetensors"))) == 1


def test_a_cache_of_tokens(sound, tmp_path):
    """What was not finished is rebuilt; what is damaged is named."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))

    def load(cache: Path) -> str:
        config = DataConfig(path=str(data), cache_dir=str(cache), max_length=64)
        return load_examples(config, sound.tokenizer)[0].fingerprint()

    cache = tmp_path / "cache"
    states = states_of(cache, lambda: load(cache))
    whole = load(cache)
    for state, torn in with_torn(states, random.Random(0)):
        try:
            assert load(state) == whole
        except UserError as error:
            assert torn and "damaged" in str(error) and "delete it" in str(error)


def test_metrics_and_samples(tmp_path):
    """A resumed run keeps whole lines of the steps before it, and adds its own."""
    config = load_config("quickstart", ["training.report_to=[none]"])
    folder = tmp_path / "run"

    def write(here: Path, first: int) -> None:
        with open_metrics(config, here, first) as writer:
            for step in range(first + 1, 5):
                writer.write(step, {"loss": 1.0 / step, "eval_loss": 2.0})

    for state, _ in with_torn(states_of(folder, lambda: write(folder, 0)), random.Random(0)):
        write(state, 2)
        lines = [json.loads(line) for line in (state / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps in ([3, 4], [1, 3, 4], [1, 2, 3, 4])
        assert list(read_evaluations(state)) == steps
