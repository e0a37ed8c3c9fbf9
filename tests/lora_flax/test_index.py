"""A model is walked once, and its index says what the model has, before and after a replacement."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from flax import nnx

import lora_flax
from lora_flax import LoraConfig, LoraError
from lora_flax.index import ModelIndex
from lora_flax.layers.dense import LoRADense
from lora_flax.layers.trained_whole import SavedModule
from lora_flax.layers.wrappers import LoRALayer
from tests.lora_flax.nets import DEPTH, WIDTH, Block, Dense, Listed, Stacked

ALL = LoraConfig(r=2, target_modules="all-linear")
# Everything at once: updates, a module and embedding rows that train in full, biases.
MIXED = LoraConfig(
    r=2,
    target_modules=["proj", "up_proj"],
    modules_to_save=["head"],
    trainable_token_indices={"embed": [1, 3]},
    bias="all",
)


class Containers(nnx.Module):
    """Layers in all the containers that a model may use, and in nested stacks."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(8, WIDTH, rngs=rngs)
        self.listed = nnx.List([Block(rngs) for _ in range(11)])
        self.named = nnx.Dict(b=Block(rngs), a=nnx.List([Block(rngs)]))
        self.plain = nnx.data({"x": [Block(rngs), {"y": Block(rngs)}]})
        self.numbered = nnx.data({3: Block(rngs)})
        self.outer = nnx.Dict(inner=nnx.Dict(up_proj=Dense((2, 3, WIDTH, WIDTH), rngs=rngs)))
        self.outer.stack_size = 2
        self.outer.inner.stack_size = 3
        self.head = nnx.Linear(WIDTH, 4, rngs=rngs)
        self.rngs = rngs


MODELS = [Listed, Stacked, Containers]


def make(kind: type[nnx.Module]) -> nnx.Module:
    return kind(nnx.Rngs(0))


def known(index: ModelIndex) -> dict[str, object]:
    """All that an index says, in its order."""
    return {
        "modules": [*index.modules.items()],
        "owners": [*index.owners.items()],
        "names": [index.names(path) for path in index.modules],
        "layers": [*index.layers],
        "shared": index.shared,
    }


def assert_true(index: ModelIndex) -> None:
    """The index equals a new one, and what Flax itself finds."""
    assert known(index) == known(ModelIndex(index.model))
    found = list(nnx.iter_modules(index.model))
    owners = [(path, m) for path, m in found if isinstance(m, (LoRALayer, SavedModule))]
    assert [*index.owners.items()] == owners
    assert [*index.wrappers.items()] == [(p, m) for p, m in owners if isinstance(m, LoRALayer)]
    assert [*index.saved_modules.items()] == [
        (p, m) for p, m in owners if isinstance(m, SavedModule)
    ]
    inside = {path for path, _ in owners}
    visible = [
        (path, m) for path, m in found if not any(path[:end] in inside for end in range(len(path)))
    ]
    assert [*index.modules.items()] == visible
    assert all(index.get(path) is module for path, module in visible)
    assert all(index.get(layer.path) is layer.module for layer in index.layers)
    same = nnx.find_duplicates(index.model, only=nnx.Module)
    assert {*index.shared} == {tuple(paths) for paths in same}


@pytest.mark.parametrize("kind", MODELS)
def test_the_index_is_what_flax_finds(kind):
    assert_true(ModelIndex(make(kind)))


@pytest.mark.parametrize("kind", MODELS)
def test_it_stays_true_when_modules_are_replaced(kind):
    index = ModelIndex(make(kind))
    before = known(index)
    plain = {layer.path: layer.module for layer in index.layers if layer.wrapper is LoRADense}
    for path, layer in plain.items():
        index.replace(path, LoRADense(layer))
        assert_true(index)
    assert list(index.wrappers) == list(plain)
    for path, wrapper in index.wrappers.items():
        index.replace(path, wrapper.base)
    assert_true(index)
    assert known(index) == before


def test_wrapping_and_unwrapping_come_back_to_the_same_index():
    model = make(Containers)
    before = known(ModelIndex(model))
    lora_flax.wrap(model, MIXED)
    index = ModelIndex(model)
    assert_true(index)
    assert {type(owner).__name__ for owner in index.owners.values()} == {
        "LoRADense",
        "TrainedCopy",
        "TrainedTokens",
    }
    lora_flax.add_adapter(model, "other", LoraConfig(r=2, modules_to_save=["listed"]))
    nested = ModelIndex(model)
    assert_true(nested)
    # The copy of the list has wrapped layers too.
    assert ("listed", "adapters", "other", 10, "proj") in nested.wrappers
    assert all(owner.active == ("other",) for owner in nested.owners.values())
    assert not any(path[0] == "listed" for path in (layer.path for layer in nested.layers))
    lora_flax.delete_adapter(model, "other")
    lora_flax.unwrap(model)
    assert known(ModelIndex(model)) == before


def test_a_base_is_replaced_inside_its_wrapper():
    model = make(Listed)
    lora_flax.wrap(model, ALL)
    index = ModelIndex(model)
    new = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(1))
    index.replace(("head", "base"), new)
    assert model.head.base is new and model.head.base_takes_key is False
    assert_true(index)


def test_names_of_nested_stacks_and_containers():
    index = ModelIndex(make(Containers))
    layers = {layer.name: layer for layer in index.layers}
    up_proj = layers["outer.inner.up_proj"]
    assert up_proj.stack == index.stack(up_proj.path) == (2, 3)
    assert up_proj.names == index.names(up_proj.path)
    assert up_proj.names[3] == "outer.1.inner.0.up_proj"
    assert index.names(("outer",)) == ("outer.0", "outer.1")
    assert {"numbered.3.proj", "plain.x.0.proj", "plain.x.1.y.proj"} < layers.keys()
    assert index.names(("plain", "x")) == ("plain.x",)
    listed = [name for name in layers if name.startswith("listed")]
    assert listed == [f"listed.{i}.proj" for i in range(11)]
    stacked = ModelIndex(make(Stacked))
    assert stacked.names(("layers", "attn")) == tuple(f"layers.{i}.attn" for i in range(DEPTH))


def test_shared_modules_are_listed_once():
    class Model(nnx.Module):
        def __init__(self):
            self.last = self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.block = Block(nnx.Rngs(0))
            self.tail = nnx.List([self.block, nnx.Linear(4, 4, rngs=nnx.Rngs(0))])

    model = Model()
    index = ModelIndex(model)
    assert_true(index)
    assert set(index.shared) == {(("first",), ("last",)), (("block",), ("tail", 0))}
    assert [layer.name for layer in index.layers] == ["block.proj", "first", "tail.1"]
    index.replace(("tail", 1), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    assert_true(index)
    # Where the first place changes, the module is listed at the next one.
    index.replace(("first",), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    assert_true(index)
    assert ("last",) in index.modules and index.shared == ((("block",), ("tail", 0)),)
    index.replace(("tail", 1), model.first)
    assert_true(index)
    assert (("first",), ("tail", 1)) in index.shared


def test_a_member_of_a_tuple_cannot_be_replaced():
    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.data((Block(nnx.Rngs(0)), Block(nnx.Rngs(0))))

    model = Model()
    index = ModelIndex(model)
    assert_true(index)
    with pytest.raises(LoraError, match=r"blocks\.1 is in a tuple"):
        index.replace(("blocks", 1), Block(nnx.Rngs(1)))
    lora_flax.wrap(model, ALL)
    assert set(ModelIndex(model).wrappers) == {("blocks", 0, "proj"), ("blocks", 1, "proj")}


@pytest.mark.parametrize("kind", MODELS)
def test_graph_mode_and_tree_mode_index_the_same(kind):
    model = make(kind)
    with nnx.set_graph_mode(False):
        tree = known(ModelIndex(model))
    assert tree == known(ModelIndex(model))


@contextmanager
def counted(monkeypatch, model: nnx.Module):
    """Collects the walks over the module tree, of all kinds, and the reads of all its variables."""
    walks: list[str] = []

    def counting(name, function):
        def run(node, *args, **kwargs):
            if name != "state" or node is model:
                walks.append(name)
            return function(node, *args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in ("iter_modules", "iter_graph", "iter_children", "find_duplicates", "state"):
            patch.setattr(nnx, name, counting(name, getattr(nnx, name)))
        patch.setattr(ModelIndex, "_walk_all", counting("index", ModelIndex._walk_all))
        yield walks


@pytest.mark.parametrize(
    ("kind", "config"), [(Listed, ALL), (Stacked, ALL), (Containers, ALL), (Containers, MIXED)]
)
def test_a_model_is_walked_once(kind, config, monkeypatch, tmp_path):
    model = make(kind)
    with counted(monkeypatch, model) as walks:
        lora_flax.wrap(model, config)
    # The report counts the parameters.
    assert sorted(walks) == ["index", "state"]
    biases = ["state"] if config.bias == "all" else []
    with counted(monkeypatch, model) as walks:
        lora_flax.save_peft(model, tmp_path, task_type=None)
    assert sorted(walks) == ["index", *biases]
    for other in (make(kind), model):  # plain, and wrapped already
        with counted(monkeypatch, other) as walks:
            lora_flax.load_peft(other, tmp_path)
        assert sorted(walks) == ["index", "state", *biases]
