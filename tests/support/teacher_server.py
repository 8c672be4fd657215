"""A small HTTP server that speaks the part of vLLM's protocol which a teacher is asked through, with faults by script. The values
are those of transformers. What a real `vllm serve` answers is in tests/e2e/test_served_teacher.py."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from json_answer import answer

from tasks.engines.hf_folder import model_rows
from tasks.engines.local import LocalModel
from tasks.engines.teacher import Host, Passage, Vocabulary
from tasks.signals import Ask

Script = Callable[[int, list[list[int]]], str | None]
"""(number of the request for completions, its sequences) -> the fault: an HTTP code, slow, fewer, shorter, logits, drop, die."""
SLOW = 1.5


class TeacherServer:
    """Serves the checkpoint `folder` under `name` on a free port. `longest`: --max-logprobs. `asked`: the sequences of every
    request for completions; `keys`: their Authorization headers."""

    def __init__(
        self, folder: Path, name: str = "teacher", longest: int = -1, length: int = 256, port: int = 0, key: str = ""
    ) -> None:
        self.name, self.length, self.key = name, length, key
        self.load(folder)
        self.longest = self.rows if longest < 0 else longest
        self.script: Script = lambda number, sequences: None
        self.asked: list[list[list[int]]] = []
        self.keys: list[str | None] = []
        self._lock, self._open = threading.Lock(), set[socket.socket]()
        self._http: ThreadingHTTPServer | None = None
        self.start(port)

    def load(self, folder: Path) -> None:
        """Serve another checkpoint from now on."""
        self.rows = model_rows(folder)
        self.model = LocalModel(folder, "float32", Host("cpu", 64))

    def start(self, port: int) -> None:
        """Listen again after `kill`."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer._open.add(self.connection)

            def do_GET(self) -> None:
                outer.models(self)

            def do_POST(self) -> None:
                outer.completions(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def log_message(self, *args: Any) -> None: ...

        ThreadingHTTPServer.allow_reuse_address = True
        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def kill(self) -> None:
        """Close the port and every connection, as a killed process does."""
        http, self._http = self._http, None
        if http is not None:
            http.socket.close()
            threading.Thread(target=http.shutdown, daemon=True).start()
            for connection in list(self._open):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            self._open.clear()

    # --- answers -----------------------------------------------------------------------------------------------------

    def _error(self, handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
        answer(handler, {"error": {"message": text, "code": status}}, status)

    def _keyed(self, handler: BaseHTTPRequestHandler) -> bool:
        self.keys.append(handler.headers.get("authorization"))
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            self._error(handler, 401, "Unauthorized")
            return False
        return True

    def models(self, handler: BaseHTTPRequestHandler) -> None:
        if self._keyed(handler):
            answer(handler, {"data": [{"id": self.name, "max_model_len": self.length}]})

    def completions(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if not self._keyed(handler):
            return
        if body["model"] != self.name:
            return self._error(handler, 404, f"The model `{body['model']}` does not exist.")
        sequences, k = body["prompt"], body["prompt_logprobs"]
        with self._lock:
            number = len(self.asked)
            self.asked.append(sequences)
            fault = self.script(number, sequences)
        if fault in ("drop", "die"):
            if fault == "die":
                self.kill()
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return None
        if fault == "slow":
            time.sleep(SLOW)
        elif fault is not None and fault.isdigit():
            return self._error(handler, int(fault), "scripted")
        k = self.rows if k == -1 else k
        if k > self.longest:
            text = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.longest}"
            return self._error(handler, 400, text)
        if any(len(ids) + 1 > self.length for ids in sequences):
            return self._error(handler, 400, f"This model's maximum context length is {self.length} tokens.")
        with self._lock:
            choices = [{"index": i, "prompt_logprobs": self._places(ids, k, fault)} for i, ids in enumerate(sequences)]
        answer(handler, {"choices": choices[: -1 if fault == "shorter" else None]})

    def _places(self, ids: list[int], k: int, fault: str | None) -> list[dict[str, Any] | None]:
        """As vLLM: the token itself, then the k likeliest; a token among these has one entry, with its rank there."""
        asked = k - 1 if fault == "fewer" else k
        ask = Ask(logprobs=True, top=frozenset([k] if k else []))
        found = self.model.score([Passage(ids[:1], ids[1:])], ask, Vocabulary(self.rows, self.rows), {})
        shift = 9.0 if fault == "logits" else 0.0
        places: list[dict[str, Any] | None] = [None]
        for at, token in enumerate(ids[1:]):
            place = {str(token): {"logprob": _json(found["logprobs"][0][at]) + shift, "rank": k + 1}}
            for rank in range(asked):
                entry = {"logprob": _json(found[f"top{k}_logprobs"][0][at][rank]) + shift, "rank": rank + 1}
                place[str(found[f"top{k}_ids"][0][at][rank])] = entry | {"decoded_token": None}
            places.append(place)
        return places


def _json(value: Any) -> float:
    return max(float(value), -9999.0)
