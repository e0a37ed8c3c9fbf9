"""Types and kernels that a config names, on devices that have them and that do not."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import lora_flax
from phi3_jax import Phi3Config, UserError
from phi3_jax import platform as kernels
from phi3_jax.config.sections import ModelConfig
from phi3_jax.model.network import Phi3
from phi3_jax.platform import check_types, set_quantized_matmul, wait_for_chip
from tests.conftest import tiny_hf_model


def config_of(**model) -> ModelConfig:
    return ModelConfig.model_validate({"path": "p"} | model)


def test_types_that_a_device_lacks(monkeypatch):
    half = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}
    for platform in ("cpu", "gpu", "tpu"):
        check_types(config_of(dtype="bfloat16"), platform)
    check_types(config_of(quantization=half), "gpu")
    with pytest.raises(UserError, match=r"model.dtype: TPUs do not support float16; use bfloat16"):
        check_types(config_of(dtype="float16"), "tpu")
    with pytest.raises(UserError, match=r"bnb_4bit_compute_dtype: TPUs do not support float16"):
        check_types(config_of(quantization=half), "tpu")
    monkeypatch.setattr(kernels, "_capability", lambda: 7.5)
    check_types(config_of(dtype="float16"), "gpu")
    with pytest.raises(UserError, match=r"model.dtype: a GPU of compute capability 7.5 does not"):
        check_types(config_of(dtype="bfloat16"), "gpu")


def test_a_chip_that_another_process_holds(tmp_path, monkeypatch, popen):
    file = tmp_path / "libtpu_lockfile"
    monkeypatch.setattr(kernels, "LIBTPU_LOCK", file)
    monkeypatch.delenv("JAX_PLATFORMS")
    wait_for_chip(1, pytest.fail)  # no such file
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print(flush=True); time.sleep(60)"
    other = popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    other.stdout.readline()
    said = []
    with pytest.raises(
        UserError, match=rf"process {other.pid} \(.*python.*\) holds this host's TPU"
    ):
        wait_for_chip(0.2, said.append)
    assert len(said) == 1 and "end it, or wait" in said[0]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    wait_for_chip(1, pytest.fail)
    monkeypatch.delenv("JAX_PLATFORMS")
    other.kill()
    other.wait()
    wait_for_chip(1, pytest.fail)


def missing(name):
    raise ImportError(name)


def test_entries_that_zstandard_compressed(monkeypatch):
    """JAX uses it where it is installed, and from Python 3.14 on."""

    class Zstandard:
        def decompress(self, entry: bytes) -> bytes:
            if not entry.endswith(b"whole"):
                raise ValueError("zstd decompress error")
            return entry

        ZstdDecompressor = classmethod(lambda cls: cls())

    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: Zstandard())
    start = bytes.fromhex("28b52ffd")
    assert kernels._is_whole(start + b"whole") and not kernels._is_whole(start + b"cut")


def test_damaged_entries_of_the_compilation_cache_are_removed(tmp_path, monkeypatch):
    """In a cache that JAX wrote; the next call writes the entry anew."""

    def run() -> list[str]:
        reset_cache()
        jax.jit(lambda x: x * 17 + 3)(jnp.arange(5))
        return sorted(file.name for file in tmp_path.glob("*-cache"))

    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        names = run()
        whole, damaged = (tmp_path / name for name in names[:2])
        kept = whole.read_bytes()
        damaged.write_bytes(damaged.read_bytes()[:-20])
        (tmp_path / "empty-cache").touch()
        (tmp_path / "folder-cache").mkdir()
        os.mkfifo(tmp_path / "fifo-cache")
        (tmp_path / "other-cache").write_bytes(bytes.fromhex("28b52ffd") + b"zstandard")
        monkeypatch.setattr(kernels.importlib, "import_module", missing)  # cannot be judged then
        kernels.remove_damaged_entries(tmp_path)
        (tmp_path / "folder-cache").rmdir()
        (tmp_path / "fifo-cache").unlink()
        left = sorted(file.name for file in tmp_path.glob("*-cache"))
        assert left == sorted({*names, "other-cache"} - {damaged.name})
        assert whole.read_bytes() == kept
        jax.clear_caches()
        assert set(run()) == {*names, "other-cache"}
        whole.write_bytes(b"")  # damaged after the first check, which left it alone
        kernels.remove_damaged_entries(tmp_path)
        assert not whole.exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


@pytest.fixture
def model() -> Phi3:
    from flax import nnx

    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    config = Phi3Config.from_hf(tiny_hf_model(**shape).config.to_dict())
    model = Phi3(config, rngs=nnx.Rngs(0))
    lora_flax.quantize(model, lora_flax.BitsAndBytesConfig(load_in_4bit=True))
    return model


def test_the_matmul_of_quantised_layers(model, monkeypatch):
    layer = model.model.layers.mlp.down_proj
    assert set_quantized_matmul(model, "auto", 1, 8, jnp.float32) is None  # nothing to choose
    with pytest.raises(UserError, match=r"pallas needs a single TPU or GPU, and this is 1 x CPU"):
        set_quantized_matmul(model, "pallas", 1, 8, jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match=r"and this is 4 x TPU"):
        set_quantized_matmul(model, "pallas", 4, 8, jnp.float32)
    assert set_quantized_matmul(model, "auto", 4, 8, jnp.float32) is None
    assert set_quantized_matmul(model, "xla", 1, 8, jnp.float32) is None and layer.platform is None
    # The kernel for TPUs cannot run on this CPU, which the choice says.
    choice = set_quantized_matmul(model, "auto", 1, 8, jnp.float32)
    assert choice is not None and choice.kernel == "xla" and choice.problem
    set_quantized_matmul(model, "pallas", 1, 8, jnp.float32)
    assert layer.platform == "tpu"
