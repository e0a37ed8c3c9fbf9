"""What `phi3-jax suggest` advises: from facts, from a run's own data, and for a device's memory."""

from __future__ import annotations

import dataclasses

import pytest

import lora_flax
from lora_flax.summary import LayerReport
from phi3_jax.advice.lengths import LengthAdvice
from phi3_jax.cli.main import main
from phi3_jax.config.loader import RunConfig, load_config
from phi3_jax.model.config import Phi3Config
from phi3_jax.planning import fit as fit_module
from phi3_jax.planning.fit import fit, this_topology
from phi3_jax.planning.plan import Plan
from phi3_jax.planning.suggest import Facts, adapter_report, batch_keys, read_facts, suggest
from tests.conftest import ROOT
from tests.phi3_jax.conftest import make_config, write_config

MINI = Phi3Config.from_file(ROOT / "tests/fixtures/checkpoints/Phi-3-mini-4k-instruct.json")
ADAPTER = lora_flax.Report(
    (LayerReport("layers.mlp.down_proj", 1, 1, 1, "16", 10**6),), 10**6, 10**9
)
FACTS = Facts(
    network=MINI, adapter=ADAPTER, learned=900_000, cut=0.0, padding=0.1, packed=0.05, rows=8,
    lengths=LengthAdvice({50: 200, 90: 400, 99: 700, 100: 900}, 768), steps=1000,
)  # fmt: skip


def config(data: dict | None = None, peft: dict | None = None, **training) -> RunConfig:
    return RunConfig.model_validate({
        "model": {"path": "x"},
        "peft": peft or {},
        "data": {"path": "x", "max_length": 512} | (data or {}),
        "training": {"output_dir": "x"} | training,
    })  # fmt: skip


def changes(config: RunConfig, **facts) -> list[str]:
    found = suggest(config, dataclasses.replace(FACTS, **facts))
    return [override for one in found for override in one.overrides]


def test_a_sound_run_is_left_alone():
    found = suggest(config(), FACTS)
    assert changes(config()) == []
    assert [one.reason.partition(" ")[0] for one in found] == [
        "learning", "rank", "length", "no", "batch:"
    ]  # fmt: skip
    assert "99% 700, longest 900" in found[2].reason


@pytest.mark.parametrize(
    ("given", "facts", "expected"),
    [
        (config(learning_rate=5e-6), {}, ["training.learning_rate=0.0004"]),
        (config(learning_rate=5e-2), {}, ["training.learning_rate=0.0004"]),
        # Half the alpha takes twice the rate.
        (config(None, {"lora_alpha": 16}, learning_rate=0), {}, ["training.learning_rate=0.0008"]),
        (config(), {"learned": 3_000_000}, ["peft.r=64"]),
        (config(), {"cut": 0.2}, ["data.max_length=768"]),
        (config({"max_length": 1024}), {"cut": 0.2}, []),  # the model has no more positions
        (config({"packing": True, "packing_strategy": "wrapped"}), {"cut": 1, "packed": None}, []),
        (config(), {"rows": 256}, [
            "training.per_device_train_batch_size=32", "training.gradient_accumulation_steps=1",
        ]),
        (config(), {"rows": 32, "steps": 25}, [
            "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1",
        ]),
        (config(max_steps=25), {"rows": 32, "steps": 25}, []),  # smaller steps would be fewer rows
    ],
)  # fmt: skip
def test_what_is_changed(given, facts, expected):
    assert changes(given, **facts) == expected


def test_attention_alone_is_widened():
    layers = (dataclasses.replace(ADAPTER.layers[0], name="layers.self_attn.qkv_proj"),)
    adapter = dataclasses.replace(ADAPTER, layers=layers)
    assert changes(config(), adapter=adapter) == ["peft.target_modules=all-linear"]


def test_the_trainable_parameters_are_those_of_the_run():
    """Phi-3-mini, r 16, all linear layers: the number that PEFT prints."""
    assert adapter_report(MINI, config().peft.to_lora()).trainable == 25_165_824


def test_facts_of_a_run(checkpoint, chats, tmp_path):
    facts = read_facts(make_config(checkpoint, chats, tmp_path / "run"))
    assert facts.rows == 4 and facts.steps == 6
    assert facts.lengths.percentiles[100] > 128  # before truncation
    assert 0 < facts.cut < 1 and 0 < facts.packed < facts.padding < 1
    assert facts.adapter.trainable > 0 < facts.learned
    # A stream has as much data as the run reads: 6 steps of 4 of these 12 rows.
    run = make_config(checkpoint, chats, tmp_path / "run", {"streaming": True})
    assert read_facts(run).learned == pytest.approx(2 * facts.learned, rel=0.02)


@pytest.mark.parametrize(
    ("rows", "fitting", "expected"),
    [(8, 8, (8, 1)), (8, 5, (4, 2)), (6, 4, (3, 2)), (7, 5, (1, 7))],
)
def test_a_step_keeps_its_rows(rows, fitting, expected):
    each, times = expected
    assert batch_keys(rows, fitting) == [
        f"training.per_device_train_batch_size={each}",
        f"training.gradient_accumulation_steps={times}",
    ]


def planned(topology: str, rows: int, peak: float, fits: bool = True) -> Plan:
    gib = 2**30
    return Plan(
        topology=topology, mesh={"data": 1, "fsdp": 1, "tensor": 1}, rows=rows, length=512,
        accumulation=1, remat="full", fits=fits, weights=gib, adapter=0, optimizer=0,
        peak=int(peak * gib), host=0, flops=0, traffic=1, collectives={}, compile_seconds=0.0,
    )  # fmt: skip


def test_memory(monkeypatch):
    run = config(per_device_train_batch_size=8)
    assert fit(run, MINI, None).reason.startswith("memory: unknown")
    monkeypatch.setattr(fit_module, "plan", lambda *_: planned("v5e:1x1", 8, 9.0))
    assert fit(run, MINI, "v5e:1x1").overrides == ()
    # The compiler refuses 8 rows and takes 3.
    monkeypatch.setattr(fit_module, "plan", lambda *_: planned("v5e:1x1", 8, 0, fits=False))
    monkeypatch.setattr(fit_module, "largest", lambda *_, **__: planned("v5e:1x1", 3, 15.0))
    assert fit(run, MINI, "v5e:1x1").overrides == (
        *batch_keys(8, 3), "training.gradient_checkpointing=true", "training.remat_policy=full"
    )  # fmt: skip
    kept = dataclasses.replace(planned("v5e:1x1", 3, 15.0), remat=("attention", "qkv"))
    monkeypatch.setattr(fit_module, "largest", lambda *_, **__: kept)
    overrides = fit(run, MINI, "v5e:1x1").overrides
    assert overrides[-1] == "training.remat_policy=['attention', 'qkv']"
    monkeypatch.setattr(fit_module, "largest", lambda *_, **__: None)
    assert "quantize" in fit(run, MINI, "v5e:1x1").reason
    # On a host, 1 GiB of weights and 1 GiB per row: 5 GiB hold four rows, and 10 GiB those of two
    # devices.
    for devices in (1, 2):
        room, found = 5 * devices * 2**30, planned(f"cpu:{devices}", 8 * devices, 9.0)
        found = dataclasses.replace(found, mesh={"data": devices, "fsdp": 1, "tensor": 1})
        monkeypatch.setattr(fit_module, "host_memory", lambda room=room: room)
        monkeypatch.setattr(fit_module, "plan", lambda *_, found=found: found)
        assert fit(run, MINI, found.topology).overrides == tuple(batch_keys(8, 4))


class Chip:
    platform = "tpu"

    def __init__(self, kind: str, *coords: int) -> None:
        self.device_kind, self.coords = kind, coords


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([Chip("TPU v5 lite", 0, 0, 0)], "v5e:1x1"),
        ([Chip("TPU v6 lite", x, y, 0) for x in range(2) for y in range(4)], "v6e:2x4"),
        ([Chip("TPU v4", x, y, 0) for x in range(2) for y in range(2)], "v4:2x2x1"),
        ([Chip("TPU v9", 0, 0, 0)], None),
    ],
)
def test_the_devices_here(monkeypatch, devices, expected):
    monkeypatch.setattr(fit_module.jax, "devices", lambda: devices)
    assert this_topology() == expected


def test_the_config_on_stdout_is_one_that_trains(checkpoint, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit_module, "plan", lambda *_: planned("cpu:1", 2, 1.0))
    run = make_config(checkpoint, chats, tmp_path / "run", {"test_size": 2}, learning_rate=1e-6)
    file = write_config(run, tmp_path / "run.yaml")
    assert main(["suggest", "--config", str(file), "peft.r=8"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "sweep.yaml").write_text(text)
    found = load_config(tmp_path / "sweep.yaml")
    assert text.startswith("# change: learning rate 3e-3 for 1e-6, which is far too low")
    assert found.training.learning_rate == 3e-3 and found.peft.r == 8
    assert found.sweep.learning_rate == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert found.training.output_dir == str(tmp_path / "run-rates")
    # What a sweep cannot train still gets its advice.
    assert main(["suggest", "--config", str(file), "peft.init_lora_weights=eva"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "eva.yaml").write_text(text)
    assert not load_config(tmp_path / "eva.yaml").sweep.values
    assert "# no sweep: " in text and "eva redistributes ranks" in text
    assert main(["suggest", "--config", str(file), "--topology", "v99:1x1"]) == 2
    assert "v99" in capsys.readouterr().err
    # With --output, the reasons are printed and the file is written, once.
    arguments = ["suggest", "--config", str(file), "--output", str(tmp_path / "new.yaml")]
    assert main(arguments) == 0
    assert "wrote " in capsys.readouterr().out and load_config(tmp_path / "new.yaml")
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
