"""What an engine refuses to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tasks.workers.pool import CHECKOUT


@pytest.mark.promise(7, "a gradient that is not finite changes no weight")
def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    script = CHECKOUT / "tests" / "support" / "spoilt_gradient.py"
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    found = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    assert len(found) == 8, done.stderr[-3000:]
    for kind in found:
        first, bad, after = kind["norms"]
        assert first > 0 and bad is None and after > 0, kind
        assert kind["same"] == [True, False], kind
