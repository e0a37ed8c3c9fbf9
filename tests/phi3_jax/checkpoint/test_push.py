"""Pushes to a small server that speaks the hub's API, by the hub's own client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from phi3_jax import UserError
from phi3_jax.checkpoint.cards import card_data
from phi3_jax.checkpoint.push import push_folder
from phi3_jax.config.loader import RunConfig
from phi3_jax.config.training import TrainingConfig
from phi3_jax.training.hub import Pushes
from tests.conftest import ROOT
from tests.phi3_jax.checkpoint.hub_server import CLIENT, Hub
from tests.phi3_jax.conftest import make_config, write_config


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "tokenizer.json", "secret.py"):
        (folder / name).write_bytes(name.encode())
    weights = np.random.default_rng(0).standard_normal((300, 100)).astype(np.float32)
    save_file({"a": weights, "b": weights[:7]}, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n# An adapter\n")
    return folder


@pytest.fixture
def client(hub, tmp_path) -> dict[str, str]:
    """The environment of a process that pushes to the server."""
    own = {"HF_ENDPOINT": hub.base, "HF_XET_CACHE": str(tmp_path / "xet"), "PYTHONPATH": str(ROOT)}
    return dict(os.environ) | CLIENT | own


def push(client: dict, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "phi3_jax.cli.main", "push", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=client | environment,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["xet", "lfs"])
def test_a_push_is_one_commit_of_what_others_need(hub, client, folder, protocol):
    client["HF_HUB_DISABLE_XET"] = str(int(protocol == "lfs"))
    done = push(client, folder, "me/pirate", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/pirate/commit/1")
    wanted = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".py"}
    assert hub.repos == {"me/pirate": wanted}
    assert hub.protocols == {protocol} and len(hub.commits) == 1
    assert hub.created[0]["name"] == "pirate" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"


@pytest.mark.parametrize(
    ("refuse", "environment", "said"),
    [
        (403, {}, "me/pirate: the push to the hub failed"),
        (0, {"HF_TOKEN": "hf_wrong"}, "me/pirate: the push to the hub failed"),
        (0, {"HF_HUB_OFFLINE": "1"}, "cannot push while HF_HUB_OFFLINE is set"),
        (0, {"HF_TOKEN": "", "HF_HOME": "/nonexistent"}, "no token for the hub"),
        (0, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/pirate: the push to the hub failed"),
    ],
)
def test_failures_are_one_line(hub, client, folder, refuse, environment, said):
    hub.refuse = refuse
    done = push(client, folder, "me/pirate", **environment)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("without_xet", "status"), [("0", 403), ("0", 500), ("1", 403)], ids=["xet", "busy", "lfs"]
)
def test_weights_that_are_refused_are_one_line(hub, client, folder, without_xet, status):
    """The hub takes everything but the content of the safetensors file."""
    hub.refuse_content = status
    client |= {"HF_HUB_DISABLE_XET": without_xet, "HF_XET_CLIENT_RETRY_MAX_DURATION": "1s"}
    done = push(client, folder, "me/pirate")
    assert done.returncode == 2 and "me/pirate: the push to the hub failed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert str(status) in done.stderr and hub.protocols == {"lfs" if int(without_xet) else "xet"}
    assert not hub.commits and not hub.repos["me/pirate"]


def test_a_silent_hub_is_given_up(folder):
    """It accepts the connection and never answers; the hub's client has no time limit."""
    program = (
        "import sys; from phi3_jax.checkpoint import push; push.SILENCE_SECONDS = 0.5; "
        "from phi3_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        settings |= {"HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program, "push", str(folder), "me/pirate"],
            capture_output=True, text=True, timeout=120, env=os.environ | settings,
        )  # fmt: skip
    assert done.returncode == 2 and "the push to the hub failed (ReadTimeout" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_only_adapters_and_models(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        push_folder(tmp_path / "none", "me/x")
    with pytest.raises(UserError, match="neither an adapter"):
        push_folder(tmp_path, "me/x")


def config_of(**training) -> TrainingConfig:
    raw = {"model": {"path": "m"}, "data": {"path": "d"}}
    training = {"output_dir": "o", "push_to_hub": True, "save_steps": 1} | training
    return RunConfig.model_validate(raw | {"training": training}).training


def test_what_the_config_needs():
    with pytest.raises(ValueError, match="training.push_to_hub: needs hub_model_id"):
        config_of()
    asked = {"hub_model_id": "me/x", "hub_strategy": "every_save"}
    with pytest.raises(ValueError, match="every_save needs push_to_hub: true"):
        config_of(**asked, push_to_hub=False)
    with pytest.raises(ValueError, match="every_save needs save_steps or save_strategy"):
        config_of(**asked, save_steps=None)
    for strategy in ("steps", "epoch"):
        config_of(**asked, save_steps=None, save_strategy=strategy)


def wait_for(pushes: Pushes, said: list[str], lines: int) -> None:
    for _ in range(1200):
        pushes.report()
        if len(said) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(said)


def test_a_failed_push_fails_no_run(folder, tmp_path):
    """conftest.py sets HF_HUB_OFFLINE."""
    said: list[str] = []
    pushes = Pushes(
        config_of(hub_model_id="me/x", hub_strategy="every_save"), tmp_path, said.append
    )
    pushes.checkpoint(3, lambda target: shutil.copytree(folder, target, dirs_exist_ok=True))
    wait_for(pushes, said, 1)
    pushes.last(folder)
    assert len(said) == 2 and all("HF_HUB_OFFLINE" in line for line in said)
    export = f"`phi3-jax export --run {tmp_path} --step 3 --format peft --output FOLDER`"
    assert (
        said[0].startswith("warning: the adapter of step 3 is not on the hub") and export in said[0]
    )
    assert f"`phi3-jax push {folder} me/x`" in said[1]


def test_a_slow_hub_stops_nothing(folder, tmp_path, monkeypatch):
    """One push at a time; of the checkpoints that come meanwhile the newest waits."""
    started, go, pushed, written = threading.Event(), threading.Event(), [], []

    def slow(adapter, repo, private, message):
        assert (adapter / "adapter_config.json").exists()
        pushed.append(message)
        started.set()
        assert go.wait(60)
        return "address"

    def write(target):
        shutil.copytree(folder, target, dirs_exist_ok=True)
        written.append(target)

    monkeypatch.setattr("phi3_jax.training.hub.push_folder", slow)
    said: list[str] = []
    pushes = Pushes(
        config_of(hub_model_id="me/x", hub_strategy="every_save"), tmp_path, said.append
    )
    pushes.checkpoint(1, write)
    assert started.wait(60)
    for step in (2, 3):
        pushes.checkpoint(step, write)
    assert not said and written[0].exists() and not written[1].exists()
    go.set()
    wait_for(pushes, said, 2)
    pushes.last(folder)
    assert pushed == ["Upload the adapter of step 1", "Upload the adapter of step 3", None]
    assert said[-1] == "pushed the adapter: address"
    assert not any(target.exists() for target in written)


RUN = """
import sys
from phi3_jax.cli.main import main
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("refuse", ["nothing", "everything", "weights"])
def test_a_run_pushes_every_checkpoint(hub, client, checkpoint, chats, tmp_path, refuse):
    hub.refuse = 500 * (refuse == "everything")
    hub.refuse_content = 403 * (refuse == "weights")
    asked = {"push_to_hub": True, "hub_model_id": "me/x", "hub_strategy": "every_save"}
    config = make_config(checkpoint, chats, tmp_path / "run", max_steps=3, save_steps=1, **asked)
    file = write_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file)],
        capture_output=True, text=True, timeout=300, env=client,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run" / "adapter"
    said = " ".join(done.stdout.split())
    if refuse != "nothing":
        assert hub.commits == [] and "the adapter is not on the hub: me/x" in said
        assert "the adapter of step 1 is not on the hub" in said
        return
    assert "Upload the adapter of step 1" in hub.commits
    assert hub.commits[-1] == "Upload adapter with phi3-jax"
    name = "adapter_model.safetensors"
    assert hub.repos["me/x"][name] == (adapter / name).read_bytes()
    assert {"README.md", "tokenizer.json", "adapter_config.json"} <= hub.repos["me/x"].keys()


def test_a_local_base_is_not_named_to_the_hub(tmp_path):
    front = card_data("microsoft/Phi-4-mini-instruct", "adapter", "peft", ["lora"]).to_dict()
    assert front["base_model"] == "microsoft/Phi-4-mini-instruct"
    assert front["tags"] == ["lora", "base_model:adapter:microsoft/Phi-4-mini-instruct"]
    assert card_data(str(tmp_path), "adapter", "peft", ["lora"]).to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
