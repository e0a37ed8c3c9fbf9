"""Shared by all tests: JAX on eight simulated CPU devices, tiny random Phi-3 checkpoints."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most of the time of these tests goes into compiling small networks: two fifths of that into LLVM's
# optimizations, and half of the rest into the newer of XLA's two emitters of fused loops.
# The fixture `optimized` is for tests that need a user's code to the bit.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
QUICK_TO_COMPILE = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if "PHI3_JAX_TESTS_CACHE" not in os.environ:
    # One folder for all worker processes of this run and the processes that tests start, gone when
    # the run ends: many of the networks are alike, and nothing is left in the user's own caches.
    CACHE = os.environ["PHI3_JAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="phi3-jax-tests-")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{CACHE}/compiled")
    USER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("HF_HOME", str(USER / "huggingface"))
    os.environ["XDG_CACHE_HOME"] = CACHE
    # But for the quickstart's weights, half a GiB that takes a while to convert.
    (USER / "phi3-jax" / "quickstart").mkdir(parents=True, exist_ok=True)
    (Path(CACHE) / "phi3-jax").mkdir()
    (Path(CACHE) / "phi3-jax" / "quickstart").symlink_to(USER / "phi3-jax" / "quickstart")

    def remove_cache(owner: int = os.getpid()) -> None:
        if os.getpid() == owner:  # not a fork of the process that made it
            shutil.rmtree(CACHE, ignore_errors=True)

    atexit.register(remove_cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A hub must never be asked by a test.
os.environ["HF_HUB_OFFLINE"] = "1"

# nohup, and a shell that starts a background job, ignore these, which processes inherit.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

import jax  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from flax import nnx  # noqa: E402
from jax._src import compiler  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jax.experimental.compilation_cache.compilation_cache import reset_cache  # noqa: E402

from tests.once import compiled_once, share_data_preparation  # noqa: E402


def compile_options(*args, options=compiler.get_compile_options, **kwargs):
    """JAX's own, with the older emitter except under `optimized`."""
    found = options(*args, **kwargs)
    if jax.config.read("jax_disable_most_optimizations"):
        found.env_option_overrides = [*found.env_option_overrides, *QUICK_TO_COMPILE.items()]
    return found


compiler.get_compile_options = compile_options
# A fifth of what it takes to lower an operation goes into a context of MLIR with all its dialects.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)
share_data_preparation()

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "phi3_jax" / "configs"

jax.config.update("jax_default_matmul_precision", "highest")
# The tensors are tiny: threads that wait for each other cost more than they save.
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

LONGROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.7 * i for i in range(8)],
    },
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 32,
}
# Every shape that `model_type: phi3` can say, small. The initial range gives logits of size 10.
SHAPES: dict[str, dict] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "partial_rotary": {"partial_rotary_factor": 0.5},
    "longrope": LONGROPE,
    "longrope_partial_gqa": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.75,
        **LONGROPE,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [1.5 + i for i in range(6)],
        },
    },
    "sliding_window": {"sliding_window": 7},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
}


def tiny_hf_model(seed: int = 0, **overrides) -> transformers.Phi3ForCausalLM:
    """A random `Phi3ForCausalLM` of three narrow layers."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    } | overrides
    torch.manual_seed(seed)
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**settings)).eval()


@functools.partial(jax.jit, static_argnums=0)
def _compiled(graphdef, state, args, kwargs):
    return nnx.merge(graphdef, state)(*args, **kwargs)


def forward(model: nnx.Module, *args, **kwargs) -> jax.Array:
    """`model(*args, **kwargs)` compiled as a whole, once for all models of the same shape.

    Called directly, each operation is a program of its own and the scan is traced each time.
    """
    return _compiled(*nnx.split(model), args, kwargs)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest module first: at the end it would keep one worker busy while the other waits."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


def pytest_collection_finish() -> None:
    """Keep torch, transformers, and JAX, a million objects, out of every garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def popen():
    """`subprocess.Popen`, whose processes are ended and whose pipes are closed after the test."""
    with contextlib.ExitStack() as stack:

        def start(*args, **settings) -> subprocess.Popen:
            process = stack.enter_context(subprocess.Popen(*args, **settings))
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs():
    """Every program that XLA compiled holds memory maps, of which a process may have 65,530.

    The whole suite has more than that in one process, and the next compilation crashes.
    """
    with compiled_once():
        yield
    jax.clear_caches()
    mlir.make_ir_context.cache_clear()
    jax.config.update("jax_enable_compilation_cache", True)  # commands turn it off on eight devices


@pytest.fixture(scope="module")
def compiled_anew():
    """No program from the cache on disk, for those over several devices: see `keep_compiled`."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.fixture
def optimized():
    """Code as a user's run compiles it: for bitwise claims, and faster with real weights."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(params=SHAPES)
def shape(request) -> dict:
    """The config overrides of each Phi-3 shape in turn."""
    return SHAPES[request.param]
