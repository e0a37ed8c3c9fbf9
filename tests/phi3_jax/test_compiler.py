"""Options of the compiler for each kind of device."""

from __future__ import annotations

import pytest

from phi3_jax.compiler import step_options

FAST_MEMORY = "xla_tpu_scoped_vmem_limit_kib"
RING = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


@pytest.fixture(autouse=True)
def options_anew(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    step_options.cache_clear()
    yield
    step_options.cache_clear()


def test_options_of_tpus():
    assert step_options("tpu", 1, "TPU v5 lite") == {FAST_MEMORY: "49152"}
    assert step_options("tpu", 8, "TPU v5 lite") == {FAST_MEMORY: "49152", RING: "1048576"}
    assert step_options("tpu", 1, "TPU v4") == {}  # has no more fast memory
    assert step_options("gpu", 1, "NVIDIA H100 80GB HBM3") == {}


def test_an_option_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{FAST_MEMORY}=98304")
    assert step_options("tpu", 8, "TPU v5 lite") == {RING: "1048576"}


def test_an_option_that_libtpu_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr("phi3_jax.compiler.jax.default_backend", lambda: "tpu")
    monkeypatch.setattr("phi3_jax.compiler._is_option", lambda name, _: name == FAST_MEMORY)
    assert step_options("tpu", 8, "TPU v5 lite") == {FAST_MEMORY: "49152"}


def test_options_of_a_cpu(monkeypatch):
    monkeypatch.setattr("phi3_jax.compiler.machine", lambda: "x86_64")
    width = {"xla_cpu_prefer_vector_width": "512"}
    assert width.items() <= step_options("cpu", 1, "cpu").items()
    assert step_options("cpu", 8, "cpu") == {}
    step_options.cache_clear()
    monkeypatch.setattr("phi3_jax.compiler._is_option", lambda name, _: "vector" in name)
    assert step_options("cpu", 1, "cpu") == width  # a version of XLA without the others
