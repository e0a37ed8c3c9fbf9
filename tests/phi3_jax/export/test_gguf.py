"""GGUF files in llama.cpp itself: the same tokens, text, and log-probabilities."""

from __future__ import annotations

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import quickstart
from phi3_jax.cli import main as cli
from phi3_jax.data.tokenizer import load_tokenizer
from phi3_jax.export.gguf_tokenizer import _CL100K, _O200K
from phi3_jax.generation.answers import stop_ids
from phi3_jax.generation.prompts import encode_chat
from tests.conftest import SHAPES, forward
from tests.phi3_jax.conftest import TOKENIZER, checkpoint  # noqa: F401
from tests.phi3_jax.export.llama_cpp import LlamaCpp
from tests.phi3_jax.export.tiny import VOCAB, by_regex, digits, write_model, write_tokenizer

LONGROPE = SHAPES["longrope"] | {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256,
}
# The context (llama.cpp's own sizes are multiples of 256) and the length of the prompt.
CASES = {
    "plain": ({}, 256, 20),
    "gqa": (SHAPES["gqa"], 256, 20),
    "partial_rotary": (SHAPES["partial_rotary"], 256, 20),
    "longrope_long": (LONGROPE, 512, 300),
    "tied": (SHAPES["tied"], 256, 20),
}


def export(*arguments: object) -> None:
    assert cli.main(["export", *map(str, arguments)]) == 0


def prompt(length: int) -> list[int]:
    return np.random.default_rng(3).integers(5, VOCAB - 4, length).tolist()


def assert_same(theirs, model, ids: list[int], bound: float, stops=(0, 4), count=8) -> None:
    """Greedy tokens, and the log-probabilities of the best ten at each of them.

    `stops` are <|endoftext|> and <|end|>.
    """
    (new,) = phi3_jax.generate(model, [ids], count, eos_ids=stops)
    logp = jax.nn.log_softmax(forward(model, np.array([ids + new[:-1]], np.int32))[0], axis=-1)
    logp = np.asarray(logp)[len(ids) - 1 :]
    # llama.cpp does not report the token that ends an answer.
    new = [token for token in new if token not in stops]
    found = theirs.greedy(ids, count)[: len(new)]
    assert len(new) > 2 and [max(step, key=step.__getitem__) for step in found] == new
    for step, ours in zip(found, logp, strict=False):
        difference = {token: abs(value - ours[token]) for token, value in step.items()}
        assert len(difference) == 10 and max(difference.values()) < bound, difference


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_the_same(tmp_path, name):
    shape, n_ctx, length = CASES[name]
    folder = write_model(tmp_path / "model", **shape)
    file = tmp_path / "model.gguf"
    export("--model", folder, "--format", "gguf", "--dtype", "float32", "--output", file)
    assert_same(LlamaCpp(file, n_ctx=n_ctx), phi3_jax.load(folder), prompt(length), 5e-4)


@pytest.mark.parametrize(("n_ctx", "factors"), [(256, "short"), (512, "long")])
def test_a_context_is_a_choice_of_rope_factors(tmp_path, n_ctx, factors):
    """llama.cpp takes the long factors for a short text too, if its context is long."""
    folder = write_model(tmp_path / "model", **LONGROPE)
    file = tmp_path / "model.gguf"
    export("--model", folder, "--format", "gguf", "--dtype", "float32", "--output", file)
    model = phi3_jax.load(folder, rope_factors=factors)
    assert_same(LlamaCpp(file, n_ctx=n_ctx), model, prompt(20), 5e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "q8_0", "q5_1", "q4_0"])
def test_types_are_those_of_the_file_as_read(tmp_path, kind):
    """llama.cpp computes with the values that the gguf package reads from the file."""
    folder = write_model(tmp_path / "model", **SHAPES["gqa"])
    file = tmp_path / "model.gguf"
    export("--model", folder, "--format", "gguf", "--dtype", kind, "--output", file)
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    model = phi3_jax.load(folder)
    layers = model.model.layers
    kernels = {
        "attn_qkv": layers.self_attn.qkv_proj, "attn_output": layers.self_attn.o_proj,
        "ffn_up": layers.mlp.gate_up_proj, "ffn_down": layers.mlp.down_proj,
    }  # fmt: skip

    def read(name: str) -> np.ndarray:
        tensor = tensors[f"{name}.weight"]
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    for name, dense in kernels.items():
        stack = np.stack([read(f"blk.{i}.{name}").T for i in range(3)])
        assert np.abs(stack - dense.kernel[...]).max() < 0.3
        dense.kernel.set_value(jax.numpy.asarray(stack))
    model.model.embed_tokens.embedding.set_value(jax.numpy.asarray(read("token_embd")))
    model.lm_head.kernel.set_value(jax.numpy.asarray(read("output").T))
    logits = forward(model, np.array([prompt(20)], np.int32))[0, -1]
    (step,) = LlamaCpp(file).greedy(prompt(20), 1)
    expected = np.asarray(jax.nn.log_softmax(logits))
    # llama.cpp rounds the activations too: to the same type, or to 8 bits for quantized weights.
    bound = {"float16": 0.02}.get(kind, 0.3)
    assert max(abs(value - expected[token]) for token, value in step.items()) < bound


def adapted(folder, **options) -> tuple[phi3_jax.Phi3, object]:
    """The model in `folder` with a random adapter, and the adapter's folder."""
    model = phi3_jax.load(folder)
    lora_flax.wrap(model, lora_flax.LoraConfig(r=4, lora_alpha=8, **options), rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    trained = nnx.state(model, lora_flax.mark_only_lora_as_trainable(model))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trained)
    nnx.update(model, moved)
    adapter = folder.parent / "adapter"
    lora_flax.save_peft(model, adapter, base_model_name_or_path=str(folder))
    return model, adapter


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {"target_modules": "all-linear"}),
        (SHAPES["gqa"], {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]}),
        ({}, {"target_modules": ["qkv_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
              "use_rslora": True, "alpha_pattern": {"layers.1.self_attn.qkv_proj": 3}}),
        ({}, {"target_modules": ["qkv_proj", "embed_tokens", "lm_head"]}),
        (SHAPES["tied"], {"target_modules": ["qkv_proj"], "layers_to_transform": [1]}),
    ],
    ids=["all", "slices", "patterns", "embeddings", "tied"],
)  # fmt: skip
def test_an_adapter_beside_its_base_and_merged(tmp_path, shape, options):
    folder = write_model(tmp_path / "model", **shape)
    model, adapter = adapted(folder, **options)
    base, lora, merged = (tmp_path / f"{name}.gguf" for name in ("base", "lora", "merged"))
    export("--model", folder, "--format", "gguf", "--dtype", "float32", "--output", base)
    export("--adapter", adapter, "--format", "gguf-adapter", "--output", lora)
    export("--adapter", adapter, "--format", "gguf", "--dtype", "float32", "--output", merged)
    plain = phi3_jax.load(folder)
    ids = prompt(20)
    assert phi3_jax.generate(plain, [ids], 8) != phi3_jax.generate(model, [ids], 8)
    assert_same(LlamaCpp(base, lora), model, ids, 5e-4)
    assert_same(LlamaCpp(merged), model, ids, 5e-4)


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ({}, {"use_dora": True}, "use_dora"),
        ({}, {"modules_to_save": ["norm"]}, "modules_to_save"),
        ({}, {"trainable_token_indices": [7]}, "trainable_token_indices"),
        (
            SHAPES["tied"],
            {"target_modules": ["embed_tokens"]},
            "an embedding that is also the head",
        ),
    ],
)
def test_what_a_gguf_adapter_cannot_say(tmp_path, capsys, shape, options, said):
    """It is refused; merged, llama.cpp gives the same."""
    folder = write_model(tmp_path / "model", **shape)
    model, adapter = adapted(folder, **{"target_modules": ["qkv_proj"]} | options)
    file = tmp_path / "x.gguf"
    arguments = ["--adapter", str(adapter), "--output", str(file), "--format"]
    assert cli.main(["export", *arguments, "gguf-adapter"]) == 2
    err = capsys.readouterr().err
    assert said in err and "--format merged" in err and not file.exists()
    export(*arguments, "gguf", "--dtype", "float32")
    assert_same(LlamaCpp(file), model, prompt(20), 5e-4)


def test_a_network_that_llama_cpp_has_not(tmp_path, capsys):
    folder = write_model(tmp_path / "model", **SHAPES["head_dim"])
    arguments = ["--model", str(folder), "--format", "gguf", "--output", str(tmp_path / "x.gguf")]
    assert cli.main(["export", *arguments]) == 2
    assert "head_dim" in capsys.readouterr().err


TEXTS = [
    "Hello worldWide, it's IT'S we'LL 7 12345 x1y22!",
    "<|user|>\nTell me  about tea.\n\n<|end|>\n<|assistant|>\n",
    "  two   spaces\n\nlines \n end?!\n//path/to\t(tabs)\r\n...don't a/b ",
    "na\u00efve \u00c9COLE \u4f60\u597d \U0001f600 \u00bd",
]


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "dbrx", "gpt-4o"])
def test_byte_level_tokenizers(tmp_path, rule):
    pre = tokenizers.pre_tokenizers
    rules = {
        "gpt-2": pre.ByteLevel(add_prefix_space=False),
        "smollm": digits(),
        "dbrx": by_regex(_CL100K),
        "gpt-4o": by_regex(_O200K),
    }
    folder = write_model(tmp_path / "model", vocab_size=400)
    write_tokenizer(folder, rules[rule], 390)
    file = tmp_path / "model.gguf"
    export("--model", folder, "--format", "gguf", "--dtype", "q8_0", "--output", file)
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == rule
    theirs, ours = LlamaCpp(file), load_tokenizer(folder)
    for text in TEXTS:
        assert theirs.tokenize(text) == ours(text, add_special_tokens=False)["input_ids"], text


def test_the_tokenizer_and_template_of_phi3(checkpoint, tmp_path):  # noqa: F811
    """Every text of the fixture, a chat as the server renders it, and the answer to it."""
    file = tmp_path / "any.gguf"
    export("--model", checkpoint, "--format", "gguf", "--dtype", "float32", "--output", file)
    theirs, ours = LlamaCpp(file, n_ctx=512), load_tokenizer(checkpoint)
    strings = (TOKENIZER / "test-strings.inp").read_text(encoding="utf-8")
    texts = strings.split("\n__ggml_vocab_test__\n")
    for text in [*texts, *TEXTS]:
        assert theirs.tokenize(text) == ours(text, add_special_tokens=False)["input_ids"], text
    messages = [{"role": "user", "content": "Tell me about tea."}]
    rendered = theirs.post("/apply-template", {"messages": messages})["prompt"]
    ids = encode_chat(messages, ours)
    assert theirs.tokenize(rendered, add_special=True) == ids
    body = {"messages": messages, "max_tokens": 12, "temperature": 0.0}
    said = theirs.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    (new,) = phi3_jax.generate(phi3_jax.load(checkpoint), [ids], 12, eos_ids=[32000, 32007])
    assert said.strip() == ours.decode(new, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_the_quickstarts_model(tmp_path):
    """SmolLM2: its answers in llama.cpp, with the same tokens and log-probabilities."""
    folder = quickstart.resolve("quickstart://smollm2-135m-instruct")
    file = tmp_path / "smollm2.gguf"
    export("--model", folder, "--format", "gguf", "--dtype", "float32", "--output", file)
    theirs, ours, model = LlamaCpp(file), load_tokenizer(folder), phi3_jax.load(folder)
    stops = stop_ids(folder, ours)
    for text in ("What is the capital of France?", "Write a haiku about na\u00efve caf\u00e9s."):
        messages = [{"role": "user", "content": text}]
        ids = encode_chat(messages, ours)
        rendered = theirs.post("/apply-template", {"messages": messages})["prompt"]
        assert theirs.tokenize(rendered, add_special=True) == ids
        (new,) = phi3_jax.generate(model, [ids], 24, eos_ids=stops)
        said = ours.decode(new, skip_special_tokens=True).strip()
        body = {"messages": messages, "max_tokens": 24, "temperature": 0.0}
        answer = theirs.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert answer.strip() == said
        # As many tokens as above, which is the same compiled program.
        assert_same(theirs, model, ids, 2e-3, stops, count=24)
