"""The commands as a user gives them, on a tiny Phi-3 with the real tokenizer."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer

import phi3_jax
from phi3_jax.cli import main as cli
from phi3_jax.cli import merge
from phi3_jax.evaluation.answer_quality import normalize, token_f1
from phi3_jax.planning.report import read_base
from phi3_jax.quickstart import local_paths
from phi3_jax.training.loop import train
from tests.conftest import ROOT
from tests.phi3_jax.conftest import chats, checkpoint, make_config, write_config  # noqa: F401


@pytest.fixture(scope="module")
def adapter(checkpoint, chats, tmp_path_factory):  # noqa: F811
    config = make_config(checkpoint, chats, tmp_path_factory.mktemp("run"), learning_rate=5e-2)
    return train(config).adapter


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_with_and_without_the_adapter(checkpoint, adapter, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "prompts.txt"
    file.write_text("Tell me about rain.\n")
    common = ("--model", checkpoint, "--max-new-tokens", "6")
    code, plain, _ = run(capsys, "generate", "Tell me about tea.", "--file", file, *common)
    assert code == 0 and plain.count("\n") >= 2
    _, adapted, _ = run(
        capsys, "generate", "Tell me about tea.", "--file", file, "--adapter", adapter, *common
    )
    assert adapted != plain
    _, again, _ = run(capsys, "generate", "Tell me about tea.", "--adapter", adapter, *common)
    assert adapted.startswith(again.rstrip("\n"))
    _, raw, _ = run(capsys, "generate", "--raw", "Tell me about tea.", *common)
    assert raw not in plain


def test_merged_folder_gives_the_same_text_in_transformers(checkpoint, adapter, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "merged"
    arguments = ("--model", checkpoint, "--adapter", adapter, "--dtype", "float32")
    code, out, _ = run(capsys, "merge", *arguments, "--output", output, "--max-shard-size", "0.002")
    assert code == 0 and str(output) in out
    assert len(list(output.glob("model-*.safetensors"))) > 1
    _, ours, _ = run(capsys, "generate", "Tell me about tea.", *arguments, "--max-new-tokens", "8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about tea."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    new = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == ours.strip()

    # bfloat16 is the default: the base as it is in that type, plus the update, rounded once.
    run(capsys, "merge", "--model", checkpoint, "--adapter", adapter, "--output", tmp_path / "bf16")
    rounded = phi3_jax.load(tmp_path / "bf16", dtype="float32")
    exact, base = (phi3_jax.load(folder, dtype="float32") for folder in (output, checkpoint))
    for name in ("o_proj", "qkv_proj"):
        kernels = [
            np.array(getattr(m.model.layers.self_attn, name).kernel[...])
            for m in (exact, base, rounded)
        ]
        in_bf16 = torch.tensor(kernels[1]).bfloat16().float().numpy()
        expected = torch.tensor(in_bf16 + (kernels[0] - kernels[1])).bfloat16().float().numpy()
        np.testing.assert_allclose(kernels[2], expected, rtol=2**-7, atol=1e-5)  # an ulp


def test_chat_streams_and_keeps_the_history(checkpoint, adapter, monkeypatch, capsys):  # noqa: F811
    lines = "Tell me about tea.\nAnd rain?\n/base\nTell me about tea.\n/adapter\n/reset\n\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    seen = []
    stream = phi3_jax.stream

    def recorded(model, prompt, **settings):
        seen.append(list(prompt))
        return stream(model, prompt, **settings)

    monkeypatch.setattr(phi3_jax, "stream", recorded)
    arguments = ("--model", checkpoint, "--adapter", adapter, "--max-new-tokens", "5")
    code, out, _ = run(capsys, "chat", *arguments)
    assert code == 0 and out.count("model:") == 3
    assert "adapter off" in out and "adapter on" in out and "started a new chat" in out
    assert len(seen) == 3 and seen[1][: len(seen[0]) - 1] == seen[0][:-1]
    assert len(seen[1]) > len(seen[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "nowhere", "hi"], "nowhere: no such folder"),
        (["generate", "--model", "CHECKPOINT"], "no prompts; give them"),
        (["generate", "--model", "CHECKPOINT", "--file", "nothing.txt"], "nothing.txt"),
        (["generate", "--model", "CHECKPOINT", "--file", "/dev/zero"], "not a regular file"),
        (["generate", "hi", "--model", "CHECKPOINT", "--adapter", "CHECKPOINT"], "not a PEFT"),
        (
            ["generate", "hi", "--model", "CHECKPOINT", "--top-p", "3"],
            "top_p must be in (0, 1], not 3.0",
        ),
        (["merge", "--model", "CHECKPOINT", "--output", "x"], "merge needs --adapter"),
    ],
)
def test_bad_input(checkpoint, capsys, arguments, said):  # noqa: F811
    arguments = [str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and said in err


def test_an_adapter_as_the_model(checkpoint, adapter, chats, tmp_path, capsys):  # noqa: F811
    """It stands for the base that it names, with the adapter, for every command."""
    question, short = "Tell me about tea.", ("--max-new-tokens", "6")
    _, expected, _ = run(
        capsys, "generate", question, "--model", checkpoint, "--adapter", adapter, *short
    )
    _, found, _ = run(capsys, "generate", question, "--model", adapter, *short)
    assert found == expected
    config = make_config(adapter, chats, tmp_path / "run", max_steps=2)
    named = local_paths(config)
    assert named.model.path == str(checkpoint)
    assert named.peft.adapter_name_or_path == str(adapter)
    assert read_base(None, config)[1] == phi3_jax.Checkpoint.open(checkpoint).config
    train(config)
    base, continued = (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        for folder in (adapter, tmp_path / "run" / "adapter")
    )
    assert base == continued == str(checkpoint)
    output = tmp_path / "merged"
    assert run(capsys, "merge", "--model", adapter, "--output", output)[0] == 0
    with pytest.raises(phi3_jax.UserError, match="is a PEFT adapter; load its base model"):
        phi3_jax.load(adapter)


def test_folders_that_are_not_what_was_meant(checkpoint, adapter, tmp_path, capsys):  # noqa: F811
    def said(*arguments) -> str:
        code, _, err = run(capsys, "generate", "hi", *arguments)
        assert code == 2 and err.count("\n") == 1
        return err

    base = ("--model", checkpoint, "--adapter")
    assert f"its adapter is {adapter}" in said(*base, adapter.parent)
    step = adapter.parent / "checkpoints" / "3"
    assert f"phi3-jax export --run {adapter.parent} --step 3" in said(*base, step)
    other = shutil.copytree(adapter, tmp_path / "other")
    assert "and " in said("--model", adapter, "--adapter", other)
    fields = json.loads((other / "adapter_config.json").read_text())
    for name, problem in (
        (None, "names no base model"),
        (str(tmp_path / "gone"), "does not exist here"),
        (str(adapter), "is itself an adapter"),
    ):
        fields["base_model_name_or_path"] = name
        (other / "adapter_config.json").write_text(json.dumps(fields))
        assert problem in said("--model", other)


def test_libtpu_prints_nothing_where_there_is_no_tpu():
    """With the extra for `plan` installed: otherwise six lines in every command on a laptop."""
    script = (
        "from phi3_jax.cli.main import main; main(['configs']); import jax, os; jax.devices();"
        "assert ('TPU_ACCELERATOR_TYPE' in os.environ) == ('TPU_SKIP_MDS_QUERY' in os.environ)"
    )
    kept = {name: value for name, value in os.environ.items() if "TPU_" not in name}
    kept.pop("JAX_PLATFORMS", None)
    kept |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=kept, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("output", ["loop", "~nobody-here/x", "a\0"])
def test_outputs_that_are_no_path(capsys, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", "--model", "m", "--adapter", "a", "--output", output])
    assert ended.value.code == 2 and "argument --output: " in capsys.readouterr().err


def test_no_home_and_no_memory(capsys, monkeypatch):
    code, _, err = run(
        capsys, "merge", "--model", "~nobody-here", "--adapter", "a", "--output", "x"
    )
    assert code == 2 and "that user has no home directory here" in err

    def exhaust(args):
        raise MemoryError

    monkeypatch.setattr(merge, "run", exhaust)
    code, _, err = run(capsys, "merge", "--model", "m", "--adapter", "a", "--output", "x")
    assert code == 2 and err.count("\n") == 1 and "not enough memory" in err


def test_merging_over_the_base_is_refused(checkpoint, adapter, capsys):  # noqa: F811
    arguments = ("--model", checkpoint, "--adapter", adapter, "--output", checkpoint)
    code, _, err = run(capsys, "merge", *arguments)
    assert code == 2 and "is the base model's own folder" in err


def test_evaluate_base_beside_adapter(checkpoint, chats, adapter, tmp_path, capsys):  # noqa: F811
    """The loss is the run's own; scores are rouge-score's; every answer is in the file."""
    config = make_config(checkpoint, chats, tmp_path / "run", {"test_size": 3}, max_steps=2)
    result = train(config)
    file = write_config(config, tmp_path / "config.yaml")
    code, out, _ = run(capsys, "evaluate", "--config", file, "--max-new-tokens", "8")
    assert code == 0 and "rougeLsum" in out and "adapter" in out
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for name, step in (("base", 0), ("adapter", 2)):
        for ours, theirs in (("loss", "eval_loss"), ("perplexity", "eval_perplexity")):
            assert metrics[name][ours] == pytest.approx(result.evaluations[step][theirs], rel=1e-4)
    lines = (tmp_path / "run" / "evaluation_samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 3
    scorer = RougeScorer(["rouge1", "rougeLsum"], use_stemmer=True)
    for name in ("base", "adapter"):
        scores = [scorer.score(s["reference"], s[name]) for s in samples]
        mean = 100 * np.mean([score["rouge1"].fmeasure for score in scores])
        assert metrics[name]["rouge1"] == pytest.approx(mean)
    # Batched answers are those of one prompt alone.
    model = phi3_jax.load(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(samples[0]["prompt"], add_special_tokens=False)["input_ids"]
    (new,) = phi3_jax.generate(model, [ids], 8, eos_ids=[32000, 32007])
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == samples[0]["base"]
    assert (
        "Tell me about" in samples[0]["prompt"] and "are what they are" in samples[0]["reference"]
    )


def test_evaluate_without_held_out_rows(checkpoint, chats, tmp_path, capsys):  # noqa: F811
    file = write_config(make_config(checkpoint, chats, tmp_path), tmp_path / "config.yaml")
    code, _, err = run(capsys, "evaluate", "--config", file)
    assert code == 2 and "nothing is held out" in err


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [("The cat sat!", "a cat sat", 1.0), ("cat", "dog", 0.0), ("", "", 1.0), ("", "x", 0.0),
     ("cat sat down", "cat sat", 0.8)],
)  # fmt: skip
def test_token_f1_is_squads(answer, reference, f1):
    assert token_f1(normalize(answer), normalize(reference)) == pytest.approx(f1)


def test_a_warning_is_one_line():
    """Without the source's path, and without what a name could do to a terminal."""
    with cli.plain_warnings():
        text = warnings.formatwarning(UserWarning("an \x1b[2J odd name"), UserWarning, "x.py", 3)
    assert text == "warning: an \\x1b[2J odd name\n"
    assert "x.py:3" in warnings.formatwarning(UserWarning("a name"), UserWarning, "x.py", 3)


def test_a_setting_of_jax_in_the_environment():
    command = [sys.executable, "-m", "phi3_jax.cli.main", "configs"]
    environment = os.environ | {"JAX_ENABLE_X64": "perhaps"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout
    assert "invalid truth value 'perhaps' for environment 'JAX_ENABLE_X64'" in run.stderr
    assert run.stderr.startswith("phi3-jax configs: ") and run.stderr.count("\n") == 1
