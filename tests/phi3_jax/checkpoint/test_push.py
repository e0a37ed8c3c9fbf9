"""Pushes to a small server on 127.0.0.1 that speaks the hub's API, by its own client."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from phi3_jax import UserError
from phi3_jax.checkpoint.cards import card_data
from phi3_jax.checkpoint.push import push_folder
from phi3_jax.config.loader import RunConfig
from phi3_jax.training.output import push_adapter
from tests.conftest import ROOT


class Hub(ThreadingHTTPServer):
    """Repositories in memory, by name; `refuse` is the status of every answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.refuse = 0


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo = "/".join(self.path.split("/")[3:5])
        if self.server.refuse:
            self.answer({"error": "You don't have the rights\nto do this"}, self.server.refuse)
        elif self.headers["Authorization"] != "Bearer hf_right":
            self.answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            self.answer({"url": f"{self.base}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kinds = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer({"files": kinds})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repos[repo][line["value"]["path"]] = content
            self.answer({"commitUrl": f"{self.base}/{repo}/commit/1", "commitOid": "1"})
        else:  # validate-yaml
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({"id": "x/y", "sha": "0", "siblings": []}, 200)

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *args) -> None:
        pass


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
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "secret.py"):
        (folder / name).write_bytes(name.encode())
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n# An adapter\n")
    return folder


def push(hub: Hub, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_right"}
    settings |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "phi3_jax.cli.main", "push", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=os.environ | settings,
    )  # fmt: skip


def test_a_push_is_one_commit_of_what_others_need(hub, folder):
    done = push(hub, folder, "me/pirate", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/pirate/commit/1")
    wanted = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".py"}
    assert hub.repos == {"me/pirate": wanted}
    assert hub.created[0]["name"] == "pirate" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"


@pytest.mark.parametrize(
    ("refuse", "environment", "said"),
    [
        (403, {}, "me/pirate: the hub did not take it"),
        (0, {"HF_TOKEN": "hf_wrong"}, "me/pirate: the hub did not take it"),
        (0, {"HF_HUB_OFFLINE": "1"}, "cannot push while HF_HUB_OFFLINE is set"),
        (0, {"HF_TOKEN": "", "HF_HOME": "/nonexistent"}, "no token for the hub"),
        (0, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/pirate: the hub did not take it"),
    ],
)
def test_failures_are_one_line(hub, folder, refuse, environment, said):
    hub.refuse = refuse
    done = push(hub, folder, "me/pirate", **environment)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_only_adapters_and_models(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        push_folder(tmp_path / "none", "me/x")
    with pytest.raises(UserError, match="neither an adapter"):
        push_folder(tmp_path, "me/x")


def test_a_failed_push_fails_no_run(folder, tmp_path, monkeypatch):
    """conftest.py sets HF_HUB_OFFLINE."""
    raw = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"output_dir": "o"}}
    raw["training"] |= {"push_to_hub": True}
    with pytest.raises(ValueError, match="training.push_to_hub: needs hub_model_id"):
        RunConfig.model_validate(raw)
    raw["training"] |= {"hub_model_id": "me/x"}
    said = push_adapter(RunConfig.model_validate(raw).training, folder)
    assert "HF_HUB_OFFLINE" in said and f"`phi3-jax push {folder} me/x`" in said


def test_a_local_base_is_not_named_to_the_hub(tmp_path):
    front = card_data("microsoft/Phi-4-mini-instruct", "adapter", "peft", ["lora"]).to_dict()
    assert front["base_model"] == "microsoft/Phi-4-mini-instruct"
    assert front["tags"] == ["lora", "base_model:adapter:microsoft/Phi-4-mini-instruct"]
    assert card_data(str(tmp_path), "adapter", "peft", ["lora"]).to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
