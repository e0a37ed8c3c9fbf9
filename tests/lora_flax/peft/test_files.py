"""Adapters to and from PEFT itself, on models that are not transformers'."""

import errno
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_flax
from lora_flax import LoraConfig, LoraError
from tests.lora_flax.nets import DEPTH, Listed, Stacked, arrays, batch, randomize, to_torch

pytestmark = pytest.mark.usefixtures("compiled_anew")

CASES = [
    (Listed, {"target_modules": ["proj"]}),
    (Listed, {"target_modules": ["encoder.1.proj", "head"], "use_rslora": True}),
    (Listed, {"target_modules": "all-linear", "bias": "all"}),
    (Listed, {"target_modules": ["proj"], "bias": "lora_only"}),
    (Stacked, {"target_modules": "all-linear"}),
    (Stacked, {"target_modules": r".*\.(up|down)_proj", "use_rslora": True}),
    (Stacked, {"target_modules": ["attn.qkv_proj", "lm_head"], "bias": "all"}),
]
# PEFT says that it cannot tell whether this lm_head is tied to an embedding.
NO_EMBEDDING = pytest.mark.filterwarnings("ignore:.*embedding layer")


def case_id(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def shake(model: nnx.Module) -> None:
    """Moves A, B and the trainable biases."""
    randomize(model)
    trains = lora_flax.mark_only_lora_as_trainable(model)
    biases = nnx.state(model, lambda path, value: path[-1] == "bias" and trains(path, value))
    nnx.update(model, jax.tree.map(lambda a: a + 0.5, biases))


def torch_output(twin: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return twin.eval()(torch.tensor(batch())).numpy()


@NO_EMBEDDING
@pytest.mark.parametrize(("make", "fields"), CASES, ids=case_id)
def test_ours_loads_in_peft(make, fields, tmp_path):
    model = make(nnx.Rngs(0))
    twin = to_torch(model)
    lora_flax.wrap(model, LoraConfig(r=3, lora_alpha=5, **fields))
    shake(model)
    lora_flax.save_peft(model, tmp_path, task_type=None)
    loaded = peft.PeftModel.from_pretrained(twin, str(tmp_path))
    np.testing.assert_allclose(model(batch()), torch_output(loaded), rtol=1e-4, atol=1e-5)

    # PEFT has no strictness of its own: the tensors it knows are exactly those in the file.
    theirs = peft.get_peft_model_state_dict(loaded)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all((theirs[key].numpy() == ours[key]).all() for key in ours)


@NO_EMBEDDING
@pytest.mark.parametrize(("make", "fields"), CASES, ids=case_id)
def test_pefts_loads_here(make, fields, tmp_path):
    model = make(nnx.Rngs(0))
    if fields["target_modules"] == "all-linear" and make is Stacked:
        fields = fields | {"target_modules": ["qkv_proj", "up_proj", "down_proj"]}
    twin = peft.get_peft_model(to_torch(model), peft.LoraConfig(r=3, lora_alpha=5, **fields))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    twin.save_pretrained(str(tmp_path))
    report = lora_flax.load_peft(model, tmp_path)
    assert report.trainable == sum(p.numel() for p in twin.parameters() if p.requires_grad)
    np.testing.assert_allclose(model(batch()), torch_output(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("make", [Listed, Stacked])
def test_a_round_trip_is_bitwise(make, bias, tmp_path):
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", bias=bias)
    model = make(nnx.Rngs(0))
    lora_flax.wrap(model, config)
    shake(model)
    lora_flax.merge(model)
    lora_flax.save_peft(model, tmp_path / "new" / "folder")
    lora_flax.unmerge(model)

    plain, wrapped = make(nnx.Rngs(0)), make(nnx.Rngs(0))
    lora_flax.wrap(wrapped, config, nnx.Rngs(7))
    for other in (plain, wrapped):
        lora_flax.load_peft(other, tmp_path / "new" / "folder")
        ours, theirs = arrays(model), arrays(other)
        chex.assert_trees_all_equal(ours, theirs)


def test_the_files(tmp_path):
    model = Stacked(nnx.Rngs(0), dtype=jnp.bfloat16)
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear")
    lora_flax.wrap(model, config)
    (tmp_path / "README.md").write_text("kept")
    lora_flax.save_peft(model, tmp_path, base_model_name_or_path="org/base", revision="abc")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["down_proj", "qkv_proj", "up_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (2, 4, 0.1)
    assert (fields["peft_type"], fields["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("org/base", "abc")
    assert fields["inference_mode"] is True
    known = set(peft.LoraConfig().to_dict())
    assert set(fields) <= known

    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == DEPTH * 3 * 2
        b = file.get_tensor("base_model.model.layers.2.attn.qkv_proj.lora_B.weight")
    assert b.shape == (6, 2) and b.dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_adapter_is_not_saved(value, tmp_path):
    model = Stacked(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules="all-linear"))
    lora_flax.save_peft(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    b = model.layers.up_proj.adapters.default.lora_B
    b.set_value(b[...].at[1, 0, 0].set(value))
    with pytest.raises(LoraError, match=r"not saved.*layers\.1\.up_proj\.lora_B\.weight$"):
        lora_flax.save_peft(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_crash_leaves_the_old_files(tmp_path, monkeypatch):
    model = Listed(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["proj"]))
    lora_flax.save_peft(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    randomize(model)

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lora_flax.save_peft(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.fixture
def saved(tmp_path):
    model = Stacked(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["qkv_proj", "up_proj"]))
    lora_flax.save_peft(model, tmp_path)
    return tmp_path


def edit(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(folder, model: nnx.Module | None = None) -> str:
    """The message; the model is left as it was."""
    model = Stacked(nnx.Rngs(0)) if model is None else model
    before = arrays(model)
    with pytest.raises(LoraError) as error:
        lora_flax.load_peft(model, folder)
    after = arrays(model)
    chex.assert_trees_all_equal(after, before)
    return str(error.value)


def test_options_that_change_the_maths_are_named_at_once(saved):
    edit(
        saved,
        layer_replication=[[0, 2]],
        alora_invocation_tokens=[1],
        target_parameters=["experts"],
        init_lora_weights="corda",
        use_qalora=False,
        ensure_weight_tying=True,
    )
    message = refused(saved)
    for name in ("layer_replication", "alora", "target_parameters", "corda"):
        assert name in message
    assert "use_qalora" not in message and "weight_tying" not in message


# PEFT 0.21's own fields that change the result, at a value that is not the default.
CHANGED = {
    "use_qalora": True,
    "layer_replication": [],
    "target_parameters": [],
    "alora_invocation_tokens": [],
    "arrow_config": {},
    "use_bdlora": {},
    "velora_config": {},
    "monteclora_config": {},
    "kasa_config": {},
    "megatron_config": {},
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_field_that_changes_the_result_is_refused(saved, name):
    edit(saved, **{name: CHANGED[name]})
    assert f"{name}={CHANGED[name]!r}" in refused(saved)
    default = peft.LoraConfig().to_dict()[name]
    edit(saved, **{name: default})
    lora_flax.load_peft(Stacked(nnx.Rngs(0)), saved)


@pytest.mark.filterwarnings("error")
def test_every_field_of_peft_is_known(saved):
    edit(saved, **{name: value for name, value in peft.LoraConfig().to_dict().items() if value})
    edit(saved, target_modules=["qkv_proj", "up_proj"], r=2, peft_type="LORA")
    lora_flax.load_peft(Stacked(nnx.Rngs(0)), saved)


def test_fields_of_a_newer_peft_warn_once(saved):
    """The adapter loads if its tensors are exactly those expected."""
    edit(saved, from_the_future=3, another="x")
    model = Stacked(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="another='x', from_the_future=3") as caught:
        lora_flax.load_peft(model, saved)
    assert len(caught) == 1
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.up_proj.lora_C.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="from_the_future"):
        assert "unexpected: base_model.model.layers.0.up_proj.lora_C.weight" in refused(saved)


def test_names_that_match_nothing_pass_as_in_peft(saved):
    """The well-known seven-name list on a fused model: PEFT writes it out as it was given."""
    edit(saved, target_modules=["q_proj", "qkv_proj", "up_proj", "gate_proj"])
    report = lora_flax.load_peft(Stacked(nnx.Rngs(0)), saved)
    assert {layer.name for layer in report.layers} == {"layers.attn.qkv_proj", "layers.up_proj"}
    edit(saved, target_modules=["q_proj", "gate_proj"])
    assert "matched no layer" in refused(saved)


def test_what_a_config_leaves_open(saved):
    """Empty lists are none, as in PEFT; a scale that is null is an error, as there."""
    edit(saved, modules_to_save=[], exclude_modules=[], layers_pattern=[], rank_pattern=None)
    lora_flax.load_peft(Stacked(nnx.Rngs(0)), saved)
    edit(saved, lora_alpha=None)
    assert "lora_alpha must be a number above 0, not None" in refused(saved)


def test_every_tensor_that_does_not_fit_is_listed(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.layers."
    del tensors[f"{prefix}0.up_proj.lora_A.weight"], tensors[f"{prefix}2.up_proj.lora_B.weight"]
    tensors[f"{prefix}3.up_proj.lora_A.weight"] = np.zeros((2, 6), np.float32)
    tensors[f"{prefix}1.up_proj.lora_B.weight"] = np.zeros((11, 2), np.float32)
    save_file(tensors, file)
    message = refused(saved)
    assert f"missing: {prefix}0.up_proj.lora_A.weight, {prefix}2.up_proj.lora_B.weight" in message
    assert f"unexpected: {prefix}3.up_proj.lora_A.weight" in message
    assert f"{prefix}1.up_proj.lora_B.weight is [11, 2], not [10, 2]" in message


def test_a_model_wrapped_otherwise(saved):
    model = Stacked(nnx.Rngs(0))
    targets = ["qkv_proj", "down_proj"]
    lora_flax.wrap(model, LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=targets))
    message = refused(saved, model)
    for text in (
        "r of layers.attn.qkv_proj is [4]",
        "lora_alpha of",
        "use_rslora is True",
        "down_proj",
    ):
        assert text in message


def test_damaged_folders(saved, tmp_path_factory):
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "damaged" in refused(saved)
    weights.rename(saved / "adapter_model.bin")
    assert "pickle" in refused(saved) and "save_pretrained" in refused(saved)
    (saved / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in refused(saved)
    edit(saved, r=0, bias="maybe")
    assert "r must be" in refused(saved) and "bias must be" in refused(saved)
    edit(saved, peft_type="IA3")
    assert "'IA3'" in refused(saved)
    config.write_text("{")
    assert "not JSON" in refused(saved)
    assert "not a PEFT adapter" in refused(tmp_path_factory.mktemp("empty"))


def test_nonfinite_tensors_are_not_loaded(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.up_proj.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, file)
    assert "layers.0.up_proj.lora_A" in refused(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_load_as_float32(saved, dtype):
    file = saved / "adapter_model.safetensors"
    tensors = {key: value.to(dtype) for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    model = Stacked(nnx.Rngs(0))
    lora_flax.load_peft(model, saved)
    a = model.layers.up_proj.adapters.default.lora_A[...]
    assert a.dtype == jnp.float32
    expected = tensors["base_model.model.layers.1.up_proj.lora_A.weight"].float().numpy().T
    assert (np.array(a[1]) == expected).all()


def test_loading_keeps_where_arrays_stand(saved):
    model = Stacked(nnx.Rngs(0))
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["qkv_proj", "up_proj"]))
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    a = model.layers.up_proj.adapters.default.lora_A
    a.set_value(jax.device_put(a[...], sharding))
    lora_flax.load_peft(model, saved)
    assert a.get_value().sharding == sharding
    assert not model.layers.up_proj.adapters.default.lora_B.get_value().committed
