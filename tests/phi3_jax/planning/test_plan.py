"""Plans: FLOPs and collectives against formulas, memory against real arrays, a TPU from afar."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import lora_flax
import phi3_jax
from phi3_jax import Phi3Config, UserError
from phi3_jax.checkpoint.abstract import abstract_model
from phi3_jax.cli import main as cli
from phi3_jax.config.loader import RunConfig
from phi3_jax.planning.collectives import collective_bytes
from phi3_jax.planning.costs import matmul_flops, products
from phi3_jax.planning.hlo import Program
from phi3_jax.planning.parts import COLLECTIVES, OTHER, PARTS
from phi3_jax.planning.plan import _mesh, plan
from phi3_jax.planning.report import read_base
from phi3_jax.planning.search import POLICIES, largest
from phi3_jax.planning.topology import CHIPS, devices_of
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training.remat import LADDER
from phi3_jax.training.sweep.members import sweep_members
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("compiled_anew")

CHECKPOINTS = ROOT / "tests" / "fixtures" / "checkpoints"
SHAPE = Phi3Config(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64,
)  # fmt: skip
LINEAR = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512  # weights of a layer


def config(length: int = 256, rows: int = 2, **model) -> RunConfig:
    return RunConfig.model_validate({
        "model": {"path": "unused"} | model,
        "peft": {"r": 8, "lora_dropout": 0.0},
        "data": {"path": "unused", "max_length": length},
        "training": {
            "output_dir": "unused", "per_device_train_batch_size": rows,
            "gradient_checkpointing": True,
        },
    })  # fmt: skip


def test_flops_of_loops():
    def function(x, w):
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        x = jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda i, x: x @ w[0], x)
        return jax.checkpoint(lambda x: x @ w[1])(x)

    jaxpr = jax.make_jaxpr(function)(jnp.ones((8, 16)), jnp.ones((5, 16, 16)))
    assert matmul_flops(jaxpr, while_trips=3) == (5 + 3 + 1) * 2 * 8 * 16 * 16
    moved = sum(product.bytes for product in products(jaxpr, while_trips=3))
    assert moved == (5 + 3 + 1) * 4 * (8 * 16 + 16 * 16 + 8 * 16)


def test_collectives_of_loops():
    mesh = make_mesh(1, 8, 1)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))

    @functools.partial(jax.jit, in_shardings=(None, split))
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    hlo = function.lower(jnp.ones((64, 32)), jnp.ones((5, 32, 32))).compile().as_text()
    found = collective_bytes(Program.parse(hlo))
    # Either the weight is gathered or the product is summed, in each of the five rounds.
    assert sum(found.values()) in (5 * 32 * 32 * 4, 5 * 64 * 32 * 4), found


def test_plan_for_simulated_devices():
    found = plan(config(), SHAPE, "cpu:8")
    assert found.fits and found.chips == 8 and found.mesh["fsdp"] == 8 and found.rows == 16
    assert found.chip is None and not found.roofline()
    tokens, layers = found.rows * found.length, SHAPE.num_hidden_layers
    # Forward, forward again, and the gradient of the input; LoRA and attention come on top.
    dense = 2 * tokens * LINEAR * layers * 3 + 4 * tokens * 256 * 512
    assert dense < found.flops < 1.25 * dense
    weights = 4 * (layers * LINEAR + 2 * 512 * 256)
    assert found.weights == pytest.approx(weights / 8, rel=0.02)
    assert found.optimizer == pytest.approx(2 * found.adapter, rel=0.01)
    assert sum(found.collectives.values()) > weights / 8
    # Every pass reads every weight of a layer, and the rows in it at least once.
    assert found.weight_traffic == 3 * 8 * found.weights
    assert found.traffic > 3 * 4 * layers * (LINEAR + 2 * tokens / 8 * 256)
    one = plan(config(), SHAPE, "cpu:1")
    assert one.traffic == pytest.approx(found.traffic, rel=1e-3)
    assert one.weights == pytest.approx(weights, rel=0.02) and one.collectives == {}
    assert one.flops == pytest.approx(found.flops / 8, rel=1e-3)


def test_quantised_weights_are_counted():
    quantization = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    found = plan(config(quantization=quantization), SHAPE, "cpu:1")
    bits = 8 * (found.weights - 4 * (2 * 512 * 256 + 9 * 256)) / (4 * LINEAR)
    assert bits == pytest.approx(4.13, abs=0.05)


def test_a_checkpoint_saved_quantized_is_planned_quantized(tmp_path):
    raw = json.loads((CHECKPOINTS / "Phi-3-mini-4k-instruct.json").read_text())
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw | {"quantization_config": settings.to_dict()}))
    read, shape = read_base(file, config())
    wanted = lora_flax.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert read.model.bitsandbytes == wanted
    assert shape == Phi3Config.from_file(CHECKPOINTS / "Phi-3-mini-4k-instruct.json")
    with pytest.raises(UserError, match="already quantized; remove model.quantization"):
        read_base(file, config(quantization={"load_in_8bit": True}))


def test_the_program_does_not_grow_with_the_layers():
    """Equal but for the sizes: compile time cannot grow either."""
    sizes = []
    for layers in (4, 40):
        shape = dataclasses.replace(SHAPE, num_hidden_layers=layers)
        found = plan(config(), shape, "cpu:1")
        sizes.append(found.flops / layers)
        assert found.weights > layers * LINEAR * 4
    np.testing.assert_allclose(sizes[1], sizes[0], rtol=0.2)


def test_the_search_ends_with_the_largest_that_fits(monkeypatch):
    """Over plans that are not compiled: the rows that fit under each policy."""
    room = {remat: 0 for remat in POLICIES} | {POLICIES[-2]: 11, "full": 40}
    module = importlib.import_module("phi3_jax.planning.search")
    real, tried = plan(config(), SHAPE, "cpu:1"), []

    def fake(config, model_config, topology, remat, rows, quick, profiled):
        tried.append((remat, rows))
        return dataclasses.replace(real, remat=remat, rows=rows, fits=rows <= room[remat])

    monkeypatch.setattr(module, "plan", fake)
    best = largest(config(), SHAPE, "cpu:1")
    assert (best.remat, best.rows) == (POLICIES[-2], 11)
    assert tried[:2] == [("none", 1), (LADDER[0], 1)]
    room.update({POLICIES[-2]: 0, "full": 0})
    assert largest(config(), SHAPE, "cpu:1") is None


def test_the_search_on_a_cpu_ends_with_this_machines_memory(monkeypatch):
    """1 GiB for each row on each of two devices."""
    module = importlib.import_module("phi3_jax.planning.search")
    real = plan(config(), SHAPE, "cpu:2")

    def fake(config, model_config, topology, remat, rows, *_):
        assert rows < 100  # the compiler refuses none
        return dataclasses.replace(real, remat=remat, rows=rows, peak=rows * 2**30)

    monkeypatch.setattr(module, "plan", fake)
    monkeypatch.setattr(module, "host_memory", lambda: 23 * 2**30)
    assert largest(config(), SHAPE, "cpu:2").rows == 11
    monkeypatch.setattr(module, "host_memory", lambda: 2**30)
    assert largest(config(), SHAPE, "cpu:2") is None


@pytest.mark.slow
def test_planning_twice_for_a_tpu_prints_no_warning(tmp_path):
    """JAX cannot load a program for a TPU that it kept: none is kept."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs: pip install 'phi3-jax[tpu]'")
    (tmp_path / "run.yaml").write_text(config().to_yaml())
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    unset = ("TPU_SKIP_MDS_QUERY", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "phi3_jax.cli.main", "plan", "--config", "run.yaml"]
    command += ["--model-config", "config.json", "--topology", "v5e:1x1", "--quick"]
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == ""


@pytest.mark.slow
@jax.default_matmul_precision("default")  # the kernel takes no other in bfloat16
def test_a_tpu_that_is_not_there():
    pytest.importorskip("libtpu", reason="the compiler for TPUs: pip install 'phi3-jax[tpu]'")
    found = plan(config(), SHAPE, "v5e:2x2", quick=True, profiled=True)
    assert found.fits and found.chips == 4
    assert found.profile is not None
    # No part is missing (SwiGLU is fused into the products around it here), nothing of a layer is
    # left over, and no part beats the chip.
    costs = found.profile
    cycles, ideal = costs.by_part(costs.cycles), costs.by_part(costs.ideal)
    assert set(cycles) >= set(PARTS) - {COLLECTIVES, OTHER, "dropout", "SwiGLU"}
    assert all(cycles[part] >= share for part, share in ideal.items())
    assert found.profile.seconds > max(found.roofline().values())
    assert found.weights + found.adapter + found.optimizer < found.peak < 2**30
    assert found.collectives and set(found.roofline()) == {"arithmetic", "memory", "collectives"}
    kept = {
        policy: plan(config(), SHAPE, "v5e:1x1", policy, 8, quick=True)
        for policy in ("dots", "offload")
    }
    assert kept["offload"].host > 0 == kept["dots"].host
    assert kept["offload"].peak < kept["dots"].peak
    assert kept["offload"].flops == kept["dots"].flops
    huge = plan(config(length=4096, rows=4096), SHAPE, "v5e:2x2", quick=True)
    assert not huge.fits and "memory" in huge.problem


def test_the_command(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(config().to_yaml())
    shape = CHECKPOINTS / "Phi-3-mini-4k-instruct.json"
    arguments = ["plan", "--config", str(file), "--model-config", str(shape)]
    assert cli.main([*arguments, "--topology", "v99:2x2"]) == 2
    assert "v5e:2x4" in capsys.readouterr().err
    assert cli.main(["plan", "--config", str(file), "--topology", "cpu:1"]) == 2
    assert "unused: no such folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="this process only has 8 CPU devices"):
        devices_of("cpu:9")


def sweep(lists: dict, **mesh) -> RunConfig:
    return RunConfig.model_validate(config().model_dump() | {"sweep": lists, "mesh": mesh})


def test_a_sweeps_members_are_planned_together(monkeypatch):
    """Each has its adapter, optimizer, and rows; the base is there once."""
    alone = plan(config(), SHAPE, "cpu:1")
    # Two of the three have the tokens that a CPU processes at once, then one is left.
    found = plan(sweep({"learning_rate": [1e-4, 2e-4, 3e-4]}), SHAPE, "cpu:1")
    assert (found.members, found.rows, alone.members) == (3, 2, 1)
    assert found.flops == 3 * alone.flops
    assert found.weights == pytest.approx(alone.weights, rel=1e-3)  # each scale is an array
    assert found.adapter == 3 * alone.adapter
    assert found.optimizer == pytest.approx(3 * alone.optimizer, rel=1e-3)
    # All at once, as on an accelerator: their products with a weight read it once.
    monkeypatch.setattr("phi3_jax.training.sweep.groups.CPU_TOKENS", 3 * 512)
    joined = plan(sweep({"learning_rate": [1e-4, 2e-4, 3e-4]}), SHAPE, "cpu:1")
    assert joined.flops == found.flops and joined.peak > found.peak
    # What recomputes a layer ends before its last product.
    read = SHAPE.num_hidden_layers * (3 * LINEAR - 256 * 512) + 2 * 256 * 512
    assert 3 * alone.traffic - joined.traffic == 2 * 4 * read


def test_a_sweeps_members_are_spread_as_in_a_run(monkeypatch):
    alone = plan(config(), SHAPE, "cpu:1")
    four = {"r": [2, 8], "seed": [1, 2]}  # each has its own batches
    found = plan(sweep(four, data=2, fsdp=2), SHAPE, "cpu:8")
    assert (found.members, found.rows, found.chips) == (4, 4, 4)
    assert found.mesh == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert found.flops == 4 * 2 * alone.flops  # every member has the rows of two devices
    assert found.weights == pytest.approx(alone.weights / 2, rel=0.01)
    assert alone.adapter < found.adapter < 2 * alone.adapter  # of two members, cut in part
    model = phi3_jax.Phi3(SHAPE, rngs=nnx.Rngs(0))
    members = [member.config.peft.to_lora() for member in sweep_members(sweep(four))]
    many = lora_flax.wrap_many(model, members, [nnx.Rngs(0) for _ in members])
    # Nor does the plan know the length of the run, which has room for these stages.
    stages = {"lr_scheduler_type": "warmup_stable_decay"}
    stages["lr_scheduler_kwargs"] = {"num_decay_steps": 2000}
    longer = {"training": config().training.model_copy(update=stages)}
    one = plan(sweep(four).model_copy(update=longer), SHAPE, "cpu:1")
    assert one.adapter == sum(leaf.nbytes for leaf in jax.tree.leaves(many.trainable))
    three = plan(sweep({"seed": [1, 2, 3]}, data=2), SHAPE, "cpu:8")
    assert three.flops == 2 * 2 * alone.flops  # one of the four is padding
    with pytest.raises(UserError, match="mesh.data: 4 is more than the sweep's members, 2"):
        plan(sweep({"seed": [1, 2]}, data=4), SHAPE, "cpu:8")
    with pytest.raises(UserError, match="a sweep trains several at once"):
        update = sweep(four).model_dump() | {"model": {"path": "x", "lora_matmul": "pallas"}}
        plan(RunConfig.model_validate(update), SHAPE, "cpu:1")


def test_a_sweep_without_a_mesh_has_a_device_for_each_member(tmp_path, capsys):
    """As in a run: a TPU's memory holds the base, and devices without a member are idle."""
    chip = CHIPS["v5e"]
    base = abstract_model(SHAPE, "bfloat16")
    devices = devices_of("cpu:8")
    found = _mesh(sweep({"r": [2, 4, 8]}), base, chip, devices)
    assert dict(found.shape) == {"data": 3, "fsdp": 1, "sequence": 1, "tensor": 1}
    file = tmp_path / "c.yaml"
    file.write_text(sweep({"r": [2, 4]}).to_yaml())
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    command = ["plan", "--config", str(file), "--model-config", str(tmp_path / "config.json")]
    assert cli.main([*command, "--topology", "cpu:1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 members, each 2 rows of 256 tokens" in said and "tokens per step │ 1,024" in said


def test_a_compiler_that_another_process_holds(monkeypatch):
    def refuse(**_):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match="v5e:2x4: another process of this host .*: wait for it"):
        devices_of("v5e:2x4")


def test_an_adapter_has_its_own_rank(tmp_path):
    """Given as the model or to continue from; new tokens have their rows."""
    base = tmp_path / "base"
    transformers.Phi3Config(**SHAPE.to_hf()).save_pretrained(base)
    asked = RunConfig.model_validate(config().model_dump() | {"model": {"path": str(base)}})
    model = phi3_jax.Phi3(SHAPE, rngs=nnx.Rngs(0))
    lora_flax.wrap(model, lora_flax.LoraConfig(r=3, target_modules=["o_proj"]))
    lora_flax.save_peft(model, tmp_path / "adapter", base_model_name_or_path=str(base))
    named = {"adapter_name_or_path": str(tmp_path / "adapter")}
    found = {
        name: plan(*read_base(None, RunConfig.model_validate(asked.model_dump() | update)), "cpu:1")
        for name, update in (
            ("as the model", {"model": {"path": str(tmp_path / "adapter")}}),
            ("continued", {"peft": asked.peft.model_dump() | named}),
            ("with tokens", {"data": asked.data.model_dump() | {"add_tokens": ["<a>", "<b>"]}}),
        )
    }
    layers = SHAPE.num_hidden_layers
    assert found["as the model"].adapter == found["continued"].adapter == 4 * layers * 3 * 512
    plain = plan(*read_base(None, asked), "cpu:1")
    assert found["with tokens"].adapter - plain.adapter == 4 * 2 * 2 * 256
    more = found["with tokens"].weights - plain.weights
    assert more == pytest.approx(4 * 2 * 2 * 256, abs=64)
