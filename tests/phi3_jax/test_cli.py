"""The commands as a user gives them, on a tiny Phi-3 with the real tokenizer."""

import io

import numpy as np
import pytest
import torch
import transformers

import phi3_jax
from phi3_jax import cli
from phi3_jax.training.loop import train
from tests.phi3_jax.training.conftest import chats, checkpoint, make_config  # noqa: F401


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
    assert "the base answers" in out and "with the adapter" in out and "a new chat" in out
    assert len(seen) == 3 and seen[1][: len(seen[0]) - 1] == seen[0][:-1]
    assert len(seen[1]) > len(seen[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "nowhere", "hi"], "nowhere: no such folder"),
        (["generate", "--model", "CHECKPOINT"], "give prompts"),
        (["generate", "--model", "CHECKPOINT", "--file", "nothing.txt"], "nothing.txt"),
        (["generate", "hi", "--model", "CHECKPOINT", "--adapter", "CHECKPOINT"], "not a PEFT"),
        (["generate", "hi", "--model", "CHECKPOINT", "--top-p", "3"], "top_p 3.0"),
        (["merge", "--model", "CHECKPOINT", "--output", "x"], "merge needs --adapter"),
    ],
)
def test_bad_input(checkpoint, capsys, arguments, said):  # noqa: F811
    arguments = [str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and said in err


def test_merging_over_the_base_is_refused(checkpoint, adapter, capsys):  # noqa: F811
    arguments = ("--model", checkpoint, "--adapter", adapter, "--output", checkpoint)
    code, _, err = run(capsys, "merge", *arguments)
    assert code == 2 and "is the base model itself" in err
