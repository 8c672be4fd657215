"""An answer of JSON, for the servers of the tests."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


def answer(handler: BaseHTTPRequestHandler, content: Any, status: int = 200, code: str | None = None) -> None:
    data = json.dumps(content).encode()
    handler.send_response(status)
    if code is not None:
        handler.send_header("X-Error-Code", code)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
