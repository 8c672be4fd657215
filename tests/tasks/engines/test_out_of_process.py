"""vLLM's engine core in a process of its own, as on a GPU: run in a child, because vLLM reads the setting once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.workers.pool import CHECKOUT

SCRIPT = """
import json, sys
from pathlib import Path
from test_sampler import Sampler, make, make_model, prompt
path = Path(sys.argv[1])
if not path.exists():
    make_model(path, 1, False)
if __name__ == "__main__":
    settings = {"device": "cpu", "threads": 1, "kv_cache_gib": 0.125, "max_num_seqs": 8, "in_process": sys.argv[2] == "in"}
    sampler = Sampler(settings)
    rows, _ = make(sampler, path, [prompt(i) for i in range(6)], list(range(6)))
    print("ROWS", json.dumps([[row["completion_token_ids"], row["sampling_logprobs"]] for row in rows]))
    sampler.close()
"""


@pytest.mark.slow
def test_all_requests_of_a_shard_enter_together(tmp_path: Path) -> None:
    """The engine is paused while they are given, so the batch, and with it every bit, is that of an engine in process."""
    script = tmp_path / "sample.py"
    script.write_text(SCRIPT)
    found = []
    for where in ("in", "out"):
        folders = (CHECKOUT, CHECKOUT / "tests" / "support", CHECKOUT / "tests" / "tasks" / "engines")
        env = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
        command = [sys.executable, str(script), str(tmp_path / "model"), where]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        [line] = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
        found.append(json.loads(line.removeprefix("ROWS ")))
    assert found[0] == found[1] and len(found[0]) == 6
