"""`model.lora_matmul`: the network with fused kernels, one device and many, and the choice."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_flax
import phi3_jax
from phi3_jax import UserError
from phi3_jax.config.loader import RunConfig
from phi3_jax.evaluation.loss import batch_loss
from phi3_jax.model.stack import Member, split_stack
from phi3_jax.planning.costs import products
from phi3_jax.planning.parts import phase_of
from phi3_jax.sharding.mesh import batch_sharding, make_mesh, place
from phi3_jax.sharding.rules import lora_shards, state_shardings
from phi3_jax.training.lora_matmul import choose_lora_matmul, refuse_sweep, use_lora_matmul
from phi3_jax.training.step import partition
from tests.phi3_jax.training.test_step import make_batch

CONFIG = phi3_jax.Phi3Config(
    vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, initializer_range=0.1,
)  # fmt: skip


def make(mesh=None, fused=True):
    model = phi3_jax.Phi3(CONFIG, rngs=nnx.Rngs(0))
    lora = lora_flax.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False
    )
    lora_flax.wrap(model, lora, rngs=nnx.Rngs(1))
    if fused:
        cut = () if mesh is None else (functools.partial(lora_shards, mesh=mesh), dict(mesh.shape))
        lora_flax.use_fused_lora(model, "tpu_interpreted", *cut)
        model.model.layers.mlp.kernel = "interpreted"
    return model


def gradients(model, remat="full", mesh=None):
    """The gradients of what trains, and the kernels of the step by phase."""
    graphdef, trainable, frozen = partition(model)
    batch = {name: jnp.asarray(value) for name, value in make_batch(4, 40).items()}
    if mesh is not None:
        trainable, frozen = (place(s, state_shardings(s, mesh)) for s in (trainable, frozen))
        batch = place(batch, batch_sharding(mesh))

    def loss(trainable, frozen, batch):
        key = jax.random.key(3)
        return batch_loss(graphdef, trainable, frozen, batch, key, remat).objective

    traced = jax.jit(jax.grad(loss)).trace(trainable, frozen, batch)
    kernels = [phase_of(p.scope) for p in products(traced.jaxpr) if p.kernel]
    return jax.tree.leaves(traced.lower().compile()(trainable, frozen, batch)), kernels


@pytest.fixture(scope="module")
def wanted():
    found, kernels = gradients(make(fused=False), "none")
    assert not kernels
    return found


def assert_equal(found, wanted):
    for own, plain in zip(found, wanted, strict=True):
        assert jnp.linalg.norm(own - plain) <= 1e-5 * jnp.linalg.norm(plain)


@pytest.mark.parametrize(("remat", "repeated"), [("full", 3), ("dots", 0), ("offload", 0)])
def test_one_device(remat, repeated, wanted):
    """Each layer's weights stay in their stack; `dots` and `offload` keep kernels' outputs.

    With `full`, the output of down_proj alone is not needed again. Backward there are two kernels
    of each layer with LoRA, and SwiGLU's.
    """
    model = make()
    _, sliced, whole = split_stack(model.model.layers)
    assert len(jax.tree.leaves(whole)) == 4
    assert not {path[-1] for path, _ in nnx.to_flat_state(sliced)} & {"kernel"}
    found, kernels = gradients(model, remat)
    assert_equal(found, wanted)
    assert kernels.count("forward") == 4 and kernels.count("backward") == 9
    assert kernels.count("recomputed") == repeated


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "data": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2}])
def test_eight_devices(sizes, wanted):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        model = make(mesh)
        # A weight that is gathered is one layer's, not the stack.
        assert not jax.tree.leaves(split_stack(model.model.layers)[2])
        found, kernels = gradients(model, mesh=mesh)
    assert kernels
    assert_equal([np.asarray(a) for a in found], wanted)


def test_a_member_reads_as_its_array():
    stack = jnp.arange(24.0).reshape(3, 2, 4)
    member = Member(stack, jnp.int32(1))
    assert member.shape == (2, 4) and member.dtype == stack.dtype
    np.testing.assert_array_equal(member[...], stack[1])


def config_of(**sections):
    base = {"model": {"path": "x"}, "data": {"path": "x", "max_length": 128}}
    merged = base | {"training": {"output_dir": "x", "per_device_train_batch_size": 1}}
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return RunConfig.model_validate(merged)


def setup_of(model, **settings):
    config = config_of(model=settings)
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    return SimpleNamespace(model=model, config=config, mesh=mesh, choices={}, notes=[])


def test_the_choice(monkeypatch):
    model = make(fused=False)
    layer = model.model.layers.mlp.down_proj

    def choose(kept=None, **settings):
        setup = setup_of(model, **settings)
        choose_lora_matmul(setup, kept)
        return setup.choices["lora_matmul"], setup.notes

    assert choose() == ("xla", []) == choose("pallas")  # this is a CPU
    with pytest.raises(UserError, match="pallas needs a TPU, and this is a CPU; use auto"):
        choose(lora_matmul="pallas")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    # The kernel for TPUs cannot run on this CPU, which the choice says.
    choice, (note,) = choose()
    assert choice == "xla" and note.startswith("LoRA matmul of 128 rows: xla (xla ")
    assert "pallas cannot run" in note and layer.platform is None
    assert choose("xla") == ("xla", []) == choose(lora_matmul="xla") and layer.platform is None
    assert choose("pallas") == ("pallas", []) and layer.platform == "tpu"
    assert model.model.layers.mlp.kernel == "tpu"
    lora_flax.quantize(model, lora_flax.BitsAndBytesConfig(load_in_8bit=True))
    assert choose() == ("xla", [])
    anew = choose("pallas")
    assert anew == ("xla", ["LoRA matmul: pallas, as before, does not run here"])
    with pytest.raises(lora_flax.LoraError, match="quantized or trained in full.*use the plain"):
        choose(lora_matmul="pallas")


def test_a_planned_model_of_shapes_alone():
    model = nnx.eval_shape(functools.partial(make, fused=False))
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    use_lora_matmul(model, config_of(), mesh, "tpu")
    assert model.model.layers.self_attn.o_proj.platform == "tpu"


def test_a_sweep_does_not_take_the_kernels():
    refuse_sweep(config_of(sweep={"learning_rate": [1e-4]}))
    with pytest.raises(UserError, match="a sweep trains several at once; use auto"):
        refuse_sweep(config_of(model={"lora_matmul": "pallas"}, sweep={"learning_rate": [1e-4]}))
