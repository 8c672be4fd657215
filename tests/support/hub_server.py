"""A hub on the loopback interface: the endpoints by which huggingface_hub looks at a repository, creates one and commits a
folder to it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from json_answer import answer

TOKEN = "hf_loopback"


class Hub:
    """What a hub holds. `repos`: by name its files; `private`: those created so; `refused`: paths that answer with 403."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cards: list[str] = []
        self.refused: set[str] = set()
        self.url = ""

    def create(self, name: str, private: bool) -> None:
        self.repos[name], self.private[name] = {}, private


@contextmanager
def served() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing on standard error."""

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(length)
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if path.startswith("/objects/"):  # as a bucket: its address is the permission
                hub.large[path.removeprefix("/objects/")] = body
                return answer(self, {})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return answer(self, {"error": "Invalid credentials"}, 401)
            if path in hub.refused:
                return answer(self, {"error": "You don't have the rights"}, 403)
            if path == "/api/whoami-v2":
                return answer(self, {"name": "acme", "type": "user", "auth": {}})
            if path == "/api/validate-yaml":  # of a model card
                hub.cards.append(json.loads(body)["content"])
                return answer(self, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'acme'}/{asked['name']}"
                if name in hub.repos:  # keeps its visibility
                    return answer(self, {"error": "You already created this repo", "url": f"{hub.url}/{name}"}, 409)
                hub.create(name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
                return answer(self, {"url": f"{hub.url}/{name}", "name": name})
            name = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
            if self.command == "GET" and path == f"/api/models/{name}":
                if name not in hub.repos:
                    return answer(self, {"error": "Repository not found"}, 404, "RepoNotFound")
                return answer(self, {"id": name, "private": hub.private[name], "siblings": []})
            if "/preupload/" in path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return answer(self, {"files": files})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**item, "actions": {"upload": {"href": f"{hub.url}/objects/{item['oid']}"}}}
                    for item in json.loads(body)["objects"]
                ]
                return answer(self, {"transfer": "basic", "objects": objects})
            if "/commit/" in path:
                return self._commit(name, body)
            answer(self, {"error": f"no endpoint {path}"}, 404)

        def _commit(self, name: str, body: bytes) -> None:
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    hub.messages.append(value["summary"])
                elif item["key"] == "file":
                    hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    data = hub.large[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"]
                    hub.repos[name][value["path"]] = data
            oid = hashlib.sha1(body).hexdigest()
            answer(self, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

        do_GET = do_POST = do_PUT = do_HEAD = _serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
