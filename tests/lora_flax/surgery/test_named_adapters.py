"""Several adapters on one model, against PEFT's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax import nets
from tests.lora_flax.encoder import VOCAB, Encoder, tokens, torch_output, trained
from tests.lora_flax.nets import WIDTH, Listed, arrays, randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding layer", "ignore:.*config file")
BIASED = {"r": 2, "target_modules": ["proj"], "bias": "lora_only"}


def test_switch_combine_disable_delete(pair):
    model, twin = pair
    assert sorted(lora_flax.adapter_names(model)) == ["one", "three", "two"]
    assert lora_flax.active_adapters(model) == ("three",)
    plain = Encoder(nnx.Rngs(0))(tokens())
    for name in ("one", "two", "three"):
        lora_flax.set_adapter(model, name)
        twin.set_adapter(name)
        np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
        with lora_flax.disable_adapter(model):
            np.testing.assert_allclose(model(tokens()), plain, rtol=1e-5, atol=1e-6)
        assert lora_flax.active_adapters(model) == (name,)
    lora_flax.set_adapter(model, ["one", "two"])
    twin.base_model.set_adapter(["one", "two"])
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
    lora_flax.merge(model)
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
    lora_flax.unmerge(model)
    lora_flax.delete_adapter(model, "one")
    twin.base_model.set_adapter(["two"])
    assert lora_flax.active_adapters(model) == ("two",)
    np.testing.assert_allclose(model(tokens()), torch_output(twin), rtol=1e-4, atol=1e-4)
    assert isinstance(model.embed_tokens, nnx.Embed)
    lora_flax.delete_adapter(model, "two")
    lora_flax.delete_adapter(model, "three")
    assert arrays(model).keys() == arrays(Encoder(nnx.Rngs(0))).keys()


def test_one_adapter_trains_biases(tmp_path):
    """Biases are the base's own: two adapters would overwrite each other's. PEFT refuses too."""
    model = Listed(nnx.Rngs(0))
    twin = peft.get_peft_model(nets.to_torch(model), peft.LoraConfig(**BIASED))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        twin.add_adapter("other", peft.LoraConfig(**BIASED | {"bias": "all"}))
    lora_flax.wrap(model, LoraConfig(**BIASED))
    lora_flax.save_peft(model, tmp_path, task_type=None)
    before = arrays(model)
    with pytest.raises(LoraError, match="'default' trains biases, .* bias='all'; set bias to"):
        lora_flax.add_adapter(model, "other", LoraConfig(**BIASED | {"bias": "all"}))
    with pytest.raises(LoraError, match="'default' trains biases, .* bias='lora_only'"):
        lora_flax.load_peft(model, tmp_path, "other")
    assert arrays(model).keys() == before.keys()
    lora_flax.load_peft(model, tmp_path)  # in its own place
    lora_flax.add_adapter(model, "other", LoraConfig(**BIASED | {"bias": "none"}))


def test_only_the_active_adapter_trains(pair):
    model, _ = pair
    lora_flax.set_adapter(model, "two")
    trains = lora_flax.mark_only_lora_as_trainable(model)
    names = arrays(model, trains)
    assert names and all(".adapters.two." in name for name in names)


def test_a_batch_that_mixes_adapters(pair):
    """PEFT's `adapter_names`, rows of every adapter and of none."""
    model, twin = pair
    rows = ["two", "__base__", "one", "three"]
    with lora_flax.mixed_batch(model, rows):
        ours = model(tokens())
    twin.eval()
    with torch.no_grad():
        theirs = twin(torch.tensor(tokens(), dtype=torch.long), adapter_names=rows).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert lora_flax.active_adapters(model) == ("three",)


def test_a_mixed_batch_has_the_modules_of_the_base(tmp_path):
    """PEFT too leaves out what an active adapter trains in full, and base weights of its file."""
    model = Encoder(nnx.Rngs(0))
    plain = model(tokens())
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="a")
    fields = {"target_modules": ["down_proj"], "modules_to_save": ["head"]}
    lora_flax.add_adapter(model, "b", LoraConfig(r=2, **fields))
    trained(model)
    lora_flax.save_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    table = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    name = "base_model.model.embed_tokens.weight"
    save_file(load_file(file) | {name: table}, file, {"format": "pt"})
    lora_flax.load_peft(model, tmp_path, "c")
    active = model(tokens())
    assert abs(active - plain).max() > 0.1
    with lora_flax.mixed_batch(model, ["a", "__base__", "a", "a"]):
        np.testing.assert_allclose(model(tokens()), plain, rtol=1e-5, atol=1e-5)
    assert (model(tokens()) == active).all()


def test_another_mix_does_not_compile_again(pair):
    model, _ = pair
    compiled = []

    @jax.jit
    def run(state, graphdef=None):
        compiled.append(1)
        return nnx.merge(graphs[0], state)(tokens())

    graphs, outputs = [], []
    for rows in (["one", "two", "one", "two"], ["two", "one", "one", "one"]):
        with lora_flax.mixed_batch(model, rows):
            graphdef, state = nnx.split(model)
            graphs.append(graphdef)
            outputs.append((rows, run(state)))
    assert graphs[0] == graphs[1] and len(compiled) == 1
    for rows, output in outputs:
        for row, name in enumerate(rows):
            lora_flax.set_adapter(model, name)
            expected = model(tokens())[row]
            np.testing.assert_allclose(output[row], expected, rtol=1e-4, atol=1e-5)


def test_adapters_added_here():
    model = Encoder(nnx.Rngs(0))
    plain = model(tokens())
    lora_flax.add_adapter(model, "a", LoraConfig(r=2, target_modules=["up_proj"]))
    lora_flax.add_adapter(model, "b", LoraConfig(r=1, target_modules=["q_proj", "head"]))
    assert (model(tokens()) == plain).all()
    randomize(model)
    with lora_flax.disable_adapter(model):
        assert (model(tokens()) == plain).all()
    with lora_flax.mixed_batch(model, ["a", "b", "__base__", "a"]):
        mixed = model(tokens())
    for row, name in ((0, "a"), (1, "b"), (3, "a")):
        lora_flax.set_adapter(model, name)
        np.testing.assert_allclose(mixed[row], model(tokens())[row], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[2], plain[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: lora_flax.add_adapter(m, "one", LoraConfig()), "adapter 'one' already exists"),
        (lambda m: lora_flax.add_adapter(m, "a.b", LoraConfig()), "Python identifier"),
        (lambda m: lora_flax.add_adapter(m, "items", LoraConfig()), "not a dict method"),
        (lambda m: lora_flax.set_adapter(m, "four"), "no adapter 'four'; the model has"),
        (lambda m: lora_flax.delete_adapter(m, "four"), "no adapter 'four'"),
        (lambda m: lora_flax.mixed_batch(m, ["four"]).__enter__(), "no adapter 'four'"),
        (
            lambda m: lora_flax.add_weighted_adapter(m, ["one"], [1, 2], "x"),
            "1 adapters and 2 weights",
        ),
        (
            lambda m: lora_flax.add_weighted_adapter(m, ["one", "two"], [1, 2], "x", "linear"),
            "adapters of equal rank",
        ),
        (lambda m: lora_flax.add_weighted_adapter(m, ["one"], [1], "x", "ties"), "linear, cat or"),
        (lambda m: lora_flax.save_peft(m, "x", adapter_name="four"), "no adapter 'four'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(pair, call, said):
    model, _ = pair
    before = arrays(model)
    with pytest.raises(LoraError, match=said):
        call(model)
    assert arrays(model).keys() == before.keys()


def test_rows_must_be_those_of_the_batch(pair):
    model, _ = pair
    with lora_flax.mixed_batch(model, ["one", "two"]), pytest.raises(LoraError, match="2 rows"):
        model(tokens())


def test_state_dict_is_strict(pair):
    """loralib's `lora_state_dict`, and a way back that hides no typo."""
    model, _ = pair
    state = lora_flax.lora_state_dict(model)
    assert all(".adapters.three." in name for name in state)
    before = {name: np.array(value) for name, value in state.items()}
    randomize(model)
    lora_flax.load_lora_state_dict(model, state)
    after = lora_flax.lora_state_dict(model)
    chex.assert_trees_all_equal(after, before)
    name = next(iter(state))
    wrong = {("typo" if key == name else key): value for key, value in state.items()}
    with pytest.raises(LoraError, match=rf"missing: {name}; unexpected: typo"):
        lora_flax.load_lora_state_dict(model, wrong)
    wrong = state | {name: jnp.zeros((1, 2))}
    with pytest.raises(LoraError, match=rf"{name} is \[1, 2\], not"):
        lora_flax.load_lora_state_dict(model, wrong)
