"""Every file that PEFT writes for a Phi-3 loads here, and what is written from it loads in PEFT."""

from __future__ import annotations

import functools

import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import UserError
from phi3_jax.checkpoint.layerwise import Layerwise
from phi3_jax.checkpoint.vocabulary import load_adapter
from phi3_jax.export.folders import write_merged
from phi3_jax.export.gguf_adapter import write_adapter
from tests.conftest import SHAPES, forward, tiny_hf_model
from tests.phi3_jax.peft_models import shaken

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about tied and resized embeddings

QKV = {"target_modules": ["qkv_proj"]}
FULL = "model.layers.2.mlp.gate_up_proj"
CASES = {
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*self_attn\.(?!qkv)\w+"},
    "ranks": {
        "target_modules": ["qkv_proj", "o_proj", "down_proj"],
        "rank_pattern": {"o_proj": 5, r"layers\.1\.mlp\.down_proj": 1},
        "alpha_pattern": {"o_proj": 7},
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"o_proj": 5}},
    "dora": {"target_modules": ["qkv_proj", "down_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["qkv_proj", "down_proj"], "lora_bias": True},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "1.mlp.down_proj"]},
    "some layers": {"target_modules": ["qkv_proj", "o_proj"], "layers_to_transform": [0, 2]},
    "full names": {"target_modules": ["o_proj", FULL], "layers_to_transform": 1},
    "a start that an embedding ignores": {
        "target_modules": ["embed_tokens", "o_proj"],
        "init_lora_weights": "olora",
    },
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens", "o_proj"]},
    "all norms": QKV | {"modules_to_save": ["norm"]},
    "the last norm": QKV | {"modules_to_save": ["model.norm"]},
    "norm of a layer": QKV | {"modules_to_save": ["layers.1.input_layernorm", "lm_head"]},
    "module of a layer": {
        "target_modules": ["qkv_proj", "down_proj"],
        "modules_to_save": ["layers.1.mlp.down_proj", "layers.0.self_attn"],
    },
    "a layer": QKV | {"modules_to_save": ["layers.1"]},
    "dora and a module": {
        "target_modules": ["o_proj", "down_proj"],
        "modules_to_save": ["layers.1.mlp.down_proj"],
        "use_dora": True,
    },
    "copies": QKV | {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head": QKV | {"modules_to_save": ["lm_head"]},
    "tokens": QKV | {"trainable_token_indices": [3, 5]},
    "tokens of the head": QKV | {"trainable_token_indices": {"lm_head": [3, 5]}},
    "tokens of both": QKV | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
}
HEAD_UPDATE = {"target_modules": ["lm_head", "qkv_proj"], "rank_pattern": {"lm_head": 3}}
ENSURED = QKV | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
TIED = (
    "head", "copies", "tokens", "tokens of the head", "tokens of both", "the last norm",
)  # fmt: skip
# With what PEFT saves of the base, and by how many rows the embedding was resized.
EMBEDDINGS = {
    "saved": (QKV, True, 0),
    "resized": (QKV, "auto", 6),
    "shrunk": (QKV, "auto", -8),
    "resized and trained": (QKV | {"modules_to_save": ["embed_tokens", "lm_head"]}, "auto", 6),
    "resized with an update": ({"target_modules": ["embed_tokens", "o_proj"]}, "auto", 6),
    "resized with tokens": (QKV | {"trainable_token_indices": [5, 130]}, "auto", 6),
    "shrunk with tokens of the head": (
        QKV | {"trainable_token_indices": {"lm_head": [3, 5]}},
        "auto",
        -8,
    ),
    "saved with tokens": (QKV | {"trainable_token_indices": [5]}, True, 0),
    "saved with tokens of both": (
        QKV | {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
        True,
        0,
    ),
    "saved and trained": (QKV | {"modules_to_save": ["embed_tokens"]}, True, 0),
}
PARAMETERS = [
    *(("gqa", CASES[case], False, 0) for case in CASES),
    *(("tied", CASES[case], False, 0) for case in TIED),
    *((shape, *case) for shape in ("gqa", "tied") for case in EMBEDDINGS.values()),
    ("tied", ENSURED, False, 0),
    ("tied", HEAD_UPDATE, "auto", 0),
    ("tied", HEAD_UPDATE | {"lora_bias": True}, "auto", 0),
    ("tied", {"target_modules": ["lm_head", "embed_tokens"]}, "auto", 0),
    ("tied", HEAD_UPDATE, "auto", 6),
]
NAMES = [
    *CASES,
    *(f"tied: {case}" for case in TIED),
    *(f"{shape}: {case}" for shape in ("gqa", "tied") for case in EMBEDDINGS),
    "tied: ensured",
    *(
        f"tied: update of the head{and_more}"
        for and_more in (
            "",
            " with a bias",
            " and the embedding",
            ", resized",
        )
    ),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    @functools.cache
    def base(shape: str):
        folder = tmp_path_factory.mktemp(shape)
        tiny_hf_model(**(SHAPES[shape] | {"initializer_range": 0.15})).save_pretrained(folder)
        return folder

    return base


def hf_base(folder, more: int = 0) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if more:
        torch.manual_seed(1)
        model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    return model.eval()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def test_an_update_of_a_tied_head_merges_into_a_head_of_its_own(bases, tmp_path):
    """The embedding stays, as in PEFT before it merges."""
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "qkv_proj"])
    adapted = shaken(hf_base(bases("tied")), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    expected = logits(adapted, tokens)
    model = phi3_jax.load(bases("tied"))
    lora_flax.load_peft(model, tmp_path / "adapter")
    with pytest.raises(lora_flax.LoraError, match="tied to the embedding cannot be merged"):
        lora_flax.merge(model)
    lora_flax.merge_and_unload(model)
    np.testing.assert_allclose(forward(model, tokens), expected, rtol=0, atol=2e-4)
    phi3_jax.save(model, tmp_path / "merged")
    np.testing.assert_allclose(logits(hf_base(tmp_path / "merged"), tokens), expected, atol=2e-4)
    stream = Layerwise.open(
        phi3_jax.Checkpoint.open(bases("tied")), tmp_path / "adapter", "float32"
    )
    np.testing.assert_allclose(stream.logits(tokens), expected, rtol=0, atol=2e-4)
    said = write_merged(stream, phi3_jax.Checkpoint.open(bases("tied")), tmp_path / "m", 2**30, "")
    assert "logits differ by at most" in said
    with pytest.raises(UserError, match="an update of a head that is tied to the embedding"):
        write_adapter(stream, tmp_path / "a.gguf", "float32", "a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora does not support a head that is tied"),
        ({"trainable_token_indices": [3]}, "lm_head is tied to an embedding: it cannot have"),
        ({"init_lora_weights": "pissa"}, "supports only dense layers, not lm_head"),
    ],
)
def test_what_an_update_of_a_tied_head_cannot_have(bases, fields, message):
    model = phi3_jax.load(bases("tied"))
    config = lora_flax.LoraConfig(r=2, target_modules=["lm_head"], **fields)
    with pytest.raises(lora_flax.LoraError, match=message):
        lora_flax.wrap(model, config)
    assert not lora_flax.adapter_names(model)


def test_an_update_of_a_tied_head_mixes_and_comes_off(bases):
    model = phi3_jax.load(bases("tied"))
    tokens = np.array([[3, 4, 5, 6]] * 2, np.int32)
    before = forward(model, tokens)
    random = {"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False}
    lora_flax.wrap(model, lora_flax.LoraConfig(**random), adapter_name="one")
    lora_flax.add_adapter(model, "two", lora_flax.LoraConfig(**random), rngs=nnx.Rngs(1))
    alone = {}
    for name in ("one", "two"):
        lora_flax.set_adapter(model, name)
        alone[name] = forward(model, tokens)
    with lora_flax.mixed_batch(model, ["one", "two"]):
        mixed = forward(model, tokens)
    for row, name in enumerate(("one", "two")):
        np.testing.assert_allclose(mixed[row], alone[name][row], rtol=0, atol=1e-4)
        assert abs(alone[name] - before).max() > 1e-2
    lora_flax.unwrap(model)
    np.testing.assert_array_equal(forward(model, tokens), before)
    every = lora_flax.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=("down_proj",))
    lora_flax.quantize(model, every)  # all that has a weight
    assert np.isfinite(forward(model, tokens)).all()


@pytest.mark.parametrize(
    ("shape", "target", "lacking"),
    [
        ("gqa", "lm_head", "model.embed_tokens"),
        ("gqa", "embed_tokens", "lm_head"),
        ("tied", "lm_head", None),
    ],
)
def test_rows_that_peft_does_not_save(bases, shape, target, lacking, tmp_path, recwarn):
    """PEFT saves only the resized embedding or head that has an update."""
    config = peft.LoraConfig(r=2, target_modules=[target, "qkv_proj"])
    adapted = shaken(hf_base(bases(shape), 6), config)
    adapted.save_pretrained(str(tmp_path))
    model = phi3_jax.load(bases(shape))
    recwarn.clear()
    load_adapter(model, tmp_path)
    said = [str(warning.message) for warning in recwarn]
    if lacking is None:
        assert not said
    else:
        assert len(said) == 1 and f"has no rows of {lacking} for tokens 128 to 133" in said[0]
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    found = np.asarray(forward(model, tokens))
    assert found.shape[-1] == model.config.vocab_size == 134
    count = 128 if lacking == "lm_head" else None
    expected = logits(adapted, tokens)
    np.testing.assert_allclose(found[..., :count], expected[..., :count], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("shape", "target"),
    [("gqa", "lm_head"), ("gqa", "embed_tokens"), ("tied", "lm_head"), ("tied", "embed_tokens")],
)
def test_rows_that_a_resize_took(bases, shape, target, tmp_path):
    """PEFT saves only the smaller embedding or head that has an update."""
    config = peft.LoraConfig(r=2, target_modules=[target, "qkv_proj"])
    adapted = shaken(hf_base(bases(shape), -8), config)
    adapted.save_pretrained(str(tmp_path))
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    expected = logits(adapted, tokens)
    model = phi3_jax.load(bases(shape))
    load_adapter(model, tmp_path)
    assert model.config.vocab_size == 120
    np.testing.assert_allclose(forward(model, tokens), expected, rtol=0, atol=2e-4)
    stream = Layerwise.open(phi3_jax.Checkpoint.open(bases(shape)), tmp_path, "float32")
    write_merged(
        stream, phi3_jax.Checkpoint.open(bases(shape)), tmp_path / "merged", 2**30, "", tmp_path
    )
    found = logits(hf_base(tmp_path / "merged"), tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("tokens", [[3, 5], {"lm_head": [3, 5]}], ids=str)
def test_a_tied_head_trains_in_full_or_by_tokens(bases, tokens):
    fields = QKV | {"modules_to_save": ["lm_head"], "trainable_token_indices": tokens}
    with pytest.raises(ValueError):
        theirs = peft.get_peft_model(hf_base(bases("tied")), peft.LoraConfig(**fields))
        logits(theirs, np.array([[3, 5]]))
    model = phi3_jax.load(bases("tied"))
    with pytest.raises(lora_flax.LoraError, match="lm_head is in modules_to_save and tied to"):
        lora_flax.wrap(model, lora_flax.LoraConfig(**fields))
    assert not lora_flax.adapter_names(model)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("mica", None),
        ("Gaussian", None),
        ("OLoRA", None),
        ("lora_ga", "right only on the base that was saved after that"),
    ],
)
def test_a_start_of_peft(bases, start, said, tmp_path, recwarn):
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=start)
    adapted = shaken(hf_base(bases("gqa")), config)
    adapted.save_pretrained(str(tmp_path))
    model = phi3_jax.load(bases("gqa"))
    recwarn.clear()
    lora_flax.load_peft(model, tmp_path)
    warned = [str(warning.message) for warning in recwarn]
    assert len(warned) == (said is not None) and all(said in text for text in warned)
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    found = forward(model, tokens)
    np.testing.assert_allclose(found, logits(adapted, tokens), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("shape", "fields", "saved", "more"), PARAMETERS, ids=NAMES)
def test_a_file_of_peft_loads_and_is_written_again(bases, shape, fields, saved, more, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields)
    adapted = shaken(hf_base(bases(shape), more), config)
    adapted.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=saved)
    tokens = np.random.default_rng(0).integers(3, 128 + min(more, 0), (2, 12), dtype=np.int32)
    tokens[0, :4] = [3, 4, 5, 127 + more]
    expected = logits(adapted, tokens)
    # PEFT saves the base of a resized embedding with an update, but not the head beside it.
    count = 128 if shape == "gqa" and more and "embed_tokens" in fields["target_modules"] else None

    model = phi3_jax.load(bases(shape))
    report = lora_flax.load_peft(model, tmp_path / "theirs")
    expected = expected[..., :count]
    np.testing.assert_allclose(forward(model, tokens), expected, rtol=0, atol=2e-4)
    assert report.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)

    lora_flax.save_peft(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(hf_base(bases(shape), more), tmp_path / "ours")
    np.testing.assert_allclose(logits(again, tokens)[..., :count], expected, rtol=0, atol=2e-4)
    other = phi3_jax.load(bases(shape))
    lora_flax.load_peft(other, tmp_path / "ours")
    np.testing.assert_allclose(forward(other, tokens), expected, rtol=0, atol=2e-4)
