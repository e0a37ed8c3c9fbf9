"""A small server on 127.0.0.1 that speaks the hub's API, as far as an upload needs it.

Like the hub, it takes safetensors and GGUF files apart from the commit, which names them by their
SHA-256: by the protocol of Xet (`/cas`), or by that of Git LFS if the client has no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What the client needs to upload here: chunks are stored as they are, and nothing is kept.
CLIENT = {"HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0", "HF_XET_XORB_COMPRESSION_POLICY": "none"}


class Hub(ThreadingHTTPServer):
    """Repositories in memory, by name.

    Attributes:
        refuse: status of every answer; 0 answers.
        refuse_content: status of every answer to an upload of a file's content.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.stored: list[bytes] = []  # LFS files, and the chunks of Xet
        self.protocols: set[str] = set()
        self.refuse = self.refuse_content = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def content(self, oid: str, size: int) -> bytes:
        """The stored file with that SHA-256."""
        for start in range(len(self.stored)):
            found = b"".join(self.stored[start:])[:size]
            if hashlib.sha256(found).hexdigest() == oid:
                return found
        raise KeyError(oid)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub, repo = self.server, "/".join(self.path.split("/")[3:5])
        content = self.path.startswith("/cas/")
        if hub.refuse:
            self.answer({"error": "You don't have the rights\nto do this"}, hub.refuse)
        elif self.headers["Authorization"] != f"Bearer {'xet' if content else 'hf_right'}":
            self.answer({"error": "Invalid token"}, 401)
        elif content:
            self.cas(body)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            hub.repos.setdefault(name, {})
            self.answer({"url": f"{hub.base}/{name}", "id": name})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            large = {path for path in paths if path.endswith((".safetensors", ".gguf"))}
            modes = {path: "lfs" if path in large else "regular" for path in paths}
            files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]
            self.answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for file in objects:
                file["actions"] = {"upload": {"href": f"{hub.base}/lfs"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                if line["key"] == "file":
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.repos[repo][value["path"]] = hub.content(value["oid"], value["size"])
            self.answer({"commitUrl": f"{hub.base}/{repo}/commit/1", "commitOid": "1"})
        else:  # validate-yaml
            self.answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        """A file by Git LFS."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.protocols.add("lfs")
        if not self.server.refuse_content:
            self.server.stored.append(data)
        self.answer({}, self.server.refuse_content or 200)

    def do_GET(self) -> None:
        if "/xet-write-token/" in self.path:
            expires = int(time.time()) + 3600
            token = {"casUrl": f"{self.server.base}/cas", "accessToken": "xet", "exp": expires}
            self.answer(token)
        elif self.path.startswith("/cas/"):
            self.answer({}, 404)  # no chunk is known
        else:
            self.answer({"id": "x/y", "sha": "0", "siblings": []})

    def cas(self, body: bytes) -> None:
        """A block of chunks, or the list of a file's chunks."""
        self.server.protocols.add("xet")
        if self.server.refuse_content:
            self.answer({}, self.server.refuse_content)
        elif "/v1/xorbs/" in self.path:
            at = 0
            while body[at : at + 7] not in (b"XETBLOB", b""):
                # Version, size (3 bytes), compression, size without compression (3 bytes).
                size = int.from_bytes(body[at + 1 : at + 4], "little")
                assert body[at + 4] == 0, "compressed"
                self.server.stored.append(body[at + 8 : at + 8 + size])
                at += 8 + size
            self.answer({"was_inserted": True})
        elif "/v1/shards" in self.path:
            self.answer({"result": 1})
        else:  # newer calls, without which the client does
            self.answer({}, 404)

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass
