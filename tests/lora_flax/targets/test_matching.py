import peft
import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from lora_flax.index import ModelIndex
from lora_flax.targets.endings import shortest_endings
from lora_flax.targets.matching import select_targets
from tests.lora_flax.nets import DEPTH, Dense, Listed, Stacked, to_torch


def selected(model, targets) -> set[str]:
    config = LoraConfig(r=2, target_modules=targets)
    return {
        name
        for target in select_targets(ModelIndex(model), config)
        for name, ranks in zip(target.layer.names, target.spec.ranks, strict=True)
        if any(ranks)
    }


TARGETS = [
    "all-linear",
    ["qkv_proj"],
    ["attn.qkv_proj", "down_proj"],
    r"layers\.\d+\.(up|down)_proj",
    r".*_proj",
    [f"layers.{index}.up_proj" for index in range(DEPTH)],
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_same_layers_as_peft(targets):
    twin = to_torch(Stacked(nnx.Rngs(0)))
    wrapped = peft.get_peft_model(twin, peft.LoraConfig(r=2, target_modules=targets))
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    # PEFT knows the head of a transformers model only; ours goes by its name.
    theirs -= {"lm_head"} if targets == "all-linear" else set()
    assert selected(Stacked(nnx.Rngs(0)), targets) == theirs


def test_names_of_a_stack_with_or_without_the_index():
    model = Stacked(nnx.Rngs(0))
    assert selected(model, ["layers.up_proj"]) == {f"layers.{i}.up_proj" for i in range(DEPTH)}
    assert selected(model, r"layers\.up_proj") == selected(model, ["layers.up_proj"])


def test_stack_sizes_multiply_and_the_index_follows_its_module():
    class Inner(nnx.Module):
        def __init__(self):
            self.proj = Dense((2, 3, 4, 5), rngs=nnx.Rngs(0))

    class Outer(nnx.Module):
        def __init__(self):
            self.inner = Inner()
            self.inner.stack_size = 3

    class Model(nnx.Module):
        def __init__(self):
            self.outer = Outer()
            self.outer.stack_size = 2

    (layer,) = ModelIndex(Model()).layers
    assert layer.stack == (2, 3)
    assert layer.names[:4] == (
        "outer.0.inner.0.proj",
        "outer.0.inner.1.proj",
        "outer.0.inner.2.proj",
        "outer.1.inner.0.proj",
    )


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "up_proj", "gate_proj"], ["'gate_proj'", "'q_proj'", "qkv_proj", "down_proj"]),
        ("qkv_proj", ["'qkv_proj'", "regular expression", "up_proj"]),
        ("(", ["not a regular expression"]),
        (None, ["not set", "qkv_proj", "lm_head"]),
    ],
)
def test_a_bad_target_says_what_there_is(targets, said):
    with pytest.raises(LoraError) as error:
        selected(Stacked(nnx.Rngs(0)), targets)
    for text in said:
        assert text in str(error.value)
    assert "'up_proj'" not in str(error.value)


def test_layers_of_other_shapes_are_named():
    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.loose = Dense((6, 4, 4), rngs=nnx.Rngs(0))

    with pytest.raises(LoraError, match=r"stack_size.*loose \[6, 4, 4\]"):
        selected(Model(), ["loose"])
    with pytest.raises(LoraError, match="has no layer to adapt.*the model itself"):
        selected(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "all-linear")


def test_a_shared_layer_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.second = self.first

    with pytest.raises(LoraError, match="first and second"):
        selected(Model(), "all-linear")


@pytest.mark.parametrize("targets", ["all-linear", ["first"], ["second"]])
def test_a_shared_weight_is_refused(targets):
    """Whether both layers are targets or one: merging it would change the other."""

    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
            self.third = nnx.Linear(4, 4, rngs=nnx.Rngs(2))
            self.second.kernel = self.first.kernel

    model = Model()
    with pytest.raises(LoraError, match="^first and second hold the same weight"):
        lora_flax.wrap(model, LoraConfig(r=2, target_modules=targets))
    assert type(model.first) is nnx.Linear
    lora_flax.wrap(model, LoraConfig(r=2, target_modules=["third"]))
    with pytest.raises(LoraError, match="^first and second hold the same weight"):
        lora_flax.add_adapter(model, "other", LoraConfig(r=2, target_modules=targets))


def test_shortest_endings_mean_the_named_layers_and_no_other():
    listed = Listed(nnx.Rngs(0))
    assert shortest_endings(ModelIndex(listed), {"encoder.1.proj"}) == ["1.proj"]
    assert shortest_endings(ModelIndex(listed), {"encoder.0.proj", "encoder.1.proj"}) == ["proj"]
    lora_flax.wrap(listed, LoraConfig(r=2, target_modules=["encoder.1.proj", "head"]))
    assert shortest_endings(ModelIndex(listed), {"encoder.1.proj", "head"}) == ["1.proj", "head"]
    assert selected(Listed(nnx.Rngs(0)), ["1.proj", "head"]) == {"encoder.1.proj", "head"}
