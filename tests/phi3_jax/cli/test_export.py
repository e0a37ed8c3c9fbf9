"""`phi3-jax export`: from any checkpoint of a run to files that other programs read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import lora_flax
import phi3_jax
from phi3_jax.cli import main as cli
from phi3_jax.config.sections import PeftConfig
from phi3_jax.training.loop import train
from phi3_jax.training.metrics import read_evaluations
from phi3_jax.training.strategies import Best
from tests.conftest import forward
from tests.phi3_jax.conftest import chats, checkpoint, make_config  # noqa: F401
from tests.phi3_jax.export.llama_cpp import LlamaCpp

TOKENS = np.arange(100, 120, dtype=np.int32)[None]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(checkpoint, chats, tmp_path_factory):  # noqa: F811
    """A run that keeps the checkpoints of steps 3 and 6 and exports the better one.

    Its schedule has more steps than the first checkpoint.
    """
    config = make_config(
        checkpoint, chats, tmp_path_factory.mktemp("runs") / "mine", {"test_size": 3},
        eval_steps=3, load_best_model_at_end=True, learning_rate=0.3, warmup_steps=1,
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 4},
    )  # fmt: skip
    train(config)
    return tmp_path_factory.getbasetemp() / config.training.output_dir


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def test_every_checkpoint_becomes_an_adapter(finished, checkpoint, tmp_path, capsys):  # noqa: F811
    for step in ("best", "3", "6", "last"):
        arguments = ("--run", finished, "--step", step, "--format", "peft")
        code, out, _ = run(capsys, "export", *arguments, "--output", tmp_path / step)
        assert code == 0 and "reloaded" in out
    found = {step: weights(tmp_path / step) for step in ("best", "3", "6", "last")}
    own = weights(finished / "adapter")
    assert all(np.array_equal(found["best"][key], own[key]) for key in own)
    assert all(np.array_equal(found["last"][key], found["6"][key]) for key in own)
    assert any(not np.array_equal(found["3"][key], found["6"][key]) for key in own)
    names = {path.name for path in (tmp_path / "3").iterdir()}
    assert names == {path.name for path in (finished / "adapter").iterdir()}
    card = (tmp_path / "3" / "README.md").read_text()
    assert "after 3 steps" in card and "after 6 steps" not in card
    fields = json.loads((tmp_path / "3" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(checkpoint)


def test_the_best_of_the_checkpoints_that_are_sound(finished, tmp_path, capsys):
    """A damaged record cannot say how good its step is, and keeps no other from being exported."""
    folder = shutil.copytree(finished, tmp_path / "run")
    best = Best("eval_loss", greater=False).choose(read_evaluations(folder))
    (folder / "checkpoints" / str(best) / "run" / "metadata").write_text("{}")
    arguments = ("--run", folder, "--step", "best", "--format", "peft", "--output", tmp_path / "o")
    code, _, err = run(capsys, "export", *arguments)
    assert code == 0
    assert f"warning: {folder}/checkpoints/{best}: damaged" in err and "not compared" in err
    assert f"after {9 - best} steps" in (tmp_path / "o" / "README.md").read_text()


@pytest.mark.parametrize(
    ("peft", "quantized"),
    [({"init_lora_weights": "pissa"}, False), ({"init_lora_weights": "eva"}, False),
     ({"use_dora": True, "modules_to_save": ["norm"]}, False), ({}, True),
     ({"use_rslora": True, "keep_rslora": True}, False)],
    ids=["pissa", "eva", "dora", "qlora", "rslora"],
)  # fmt: skip
def test_the_last_checkpoint_is_what_the_run_wrote(
    checkpoint, chats, tmp_path, capsys, peft, quantized  # noqa: F811
):  # fmt: skip
    config = make_config(checkpoint, chats, tmp_path / "run", max_steps=2)
    section = PeftConfig.model_validate({"r": 4, "lora_alpha": 8} | peft)
    model = config.model
    if quantized:
        model = type(model).model_validate(
            {"path": model.path, "quantization": {"load_in_4bit": True}}
        )
    config = config.model_copy(update={"peft": section, "model": model})
    adapter = train(config).adapter
    own, output = weights(adapter), tmp_path / "again"
    code, _, err = run(
        capsys, "export", "--run", tmp_path / "run", "--format", "peft", "--output", output
    )
    assert code == 0, err
    found = weights(output)
    assert found.keys() == own.keys()
    assert all(np.array_equal(found[key], own[key]) for key in own)
    fields = [json.loads((f / "adapter_config.json").read_text()) for f in (output, adapter)]
    assert fields[0] == fields[1]
    assert (output / "quantization_config.json").exists() == quantized


def test_each_format(finished, checkpoint, tmp_path, capsys):  # noqa: F811
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    note = "Trained with LongRoPE's long factors for every text."
    with (adapter / "README.md").open("a") as card:
        card.write(f"\n{note}\n")
    model = phi3_jax.load(checkpoint)
    lora_flax.load_peft(model, adapter)
    logits = np.asarray(forward(model, TOKENS))
    written = {}
    for form, name in (("unfused", "u"), ("merged", "m"), ("gguf", "g.gguf"),
                       ("gguf-adapter", "a.gguf")):  # fmt: skip
        written[form] = tmp_path / name
        dtype = "float32" if form in ("merged", "gguf") else "auto"
        arguments = ("--adapter", adapter, "--format", form, "--dtype", dtype)
        code, out, err = run(capsys, "export", *arguments, "--output", written[form])
        assert code == 0, err
        assert str(written[form]) in out and ("reloaded" in out or "read back" in out)
        assert note in out
    assert any("q_proj" in key for key in weights(written["unfused"]))
    other = phi3_jax.load(checkpoint)
    lora_flax.load_peft(other, written["unfused"])
    np.testing.assert_allclose(forward(other, TOKENS), logits, rtol=0, atol=2e-4)
    merged = forward(phi3_jax.load(written["merged"]), TOKENS)
    np.testing.assert_allclose(merged, logits, rtol=0, atol=2e-4)
    transformers.AutoTokenizer.from_pretrained(written["merged"])
    card = (written["merged"] / "README.md").read_text()
    assert "library_name" in card and note in card
    (new,) = phi3_jax.generate(model, TOKENS.tolist(), 6)
    for theirs in (LlamaCpp(written["gguf"]),):
        steps = theirs.greedy(TOKENS[0].tolist(), 6)
        assert [max(step, key=step.__getitem__) for step in steps] == new[: len(steps)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "peft", "--output", "x"], "give --run, --adapter or --model"),
        (["--run", "RUN", "--model", "m", "--format", "peft", "--output", "x"], "leave out"),
        (["--run", "RUN", "--step", "4", "--format", "peft", "--output", "x"], "only of [3, 6]"),
        (["--run", "RUN", "--step", "-1", "--format", "peft", "--output", "x"], "not a number"),
        (["--run", "nowhere", "--format", "peft", "--output", "x"], "no config.yaml"),
        (["--model", "BASE", "--format", "peft", "--output", "x"], "needs --adapter or --run"),
        (["--adapter", "BASE", "--format", "peft", "--output", "x"], "is not a PEFT adapter"),
        (["--model", "BASE", "--step", "3", "--format", "gguf", "--output", "x.gguf"], "--run"),
        (["--model", "BASE", "--format", "gguf", "--output", "x"], "writes a .gguf file"),
        (["--model", "BASE", "--format", "merged", "--output", "x.gguf"], "writes a folder"),
        (["--model", "BASE", "--format", "merged", "--output", "BASE"], "own folder"),
        (["--model", "BASE", "--format", "merged", "--dtype", "q8_0", "--output", "x"], "gguf"),
        (["--run", "RUN", "--step", "\u00b2", "--format", "peft", "--output", "x"], "not a number"),
        (
            ["--model", "RUN", "--format", "merged", "--output", "x"],
            "a run's folder; its adapter is",
        ),
        (
            ["--adapter", "RUN", "--format", "merged", "--output", "x"],
            "run's folder; its adapter is",
        ),
        (["--model", "STEP", "--format", "merged", "--output", "x"], "--step 3 --format peft"),
        (["--adapter", "STEP", "--format", "merged", "--output", "x"], "--step 3 --format peft"),
        (["--run", "STEP", "--format", "merged", "--output", "x"], "--step 3 --format peft"),
        (["--run", "ADAPTER", "--format", "merged", "--output", "x"], "is a PEFT adapter; give it"),
        (["--run", "BASE", "--format", "merged", "--output", "x"], "is a model; give it as"),
        (
            ["--adapter", "FILE", "--format", "merged", "--output", "x"],
            "is a file; give its folder",
        ),
        (["--adapter", "ADAPTER", "--format", "merged", "--output", "RUN"], "holds a run"),
        (["--adapter", "ADAPTER", "--format", "merged", "--output", "ADAPTER"], "a PEFT adapter;"),
        (["--run", "RUN", "--format", "peft", "--output", "BASE"], "holds a model; choose"),
        (["--run", "RUN", "--format", "peft", "--output", "/proc/x"], "cannot be written"),
    ],
)
def test_what_means_nothing_is_refused(finished, checkpoint, capsys, arguments, said):  # noqa: F811
    named = {"RUN": finished, "BASE": checkpoint, "STEP": finished / "checkpoints" / "3"}
    named |= {"ADAPTER": finished / "adapter", "FILE": finished / "adapter/adapter_config.json"}
    code, _, err = run(capsys, "export", *(named.get(a, a) for a in arguments))
    assert code == 2 and said in err and err.count("\n") == 1
