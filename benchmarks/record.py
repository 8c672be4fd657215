"""The figures that a benchmark leaves for the table of `make bench` (`benchmarks/bench.py`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

PLACE = "OPD_BENCH_RECORDS"
"""Environment variable with the file that figures are appended to; unset when a benchmark is run alone."""


def record(what: str, values: Iterable[float], aim: str = "", unit: str = "ratio") -> None:
    """Leaves the figures of one row: one value per turn. `aim` is the target in words, empty where there is none."""
    if place := os.environ.get(PLACE):
        row = {"what": what, "values": [float(value) for value in values], "aim": aim, "unit": unit}
        with Path(place).open("a") as file:
            file.write(json.dumps(row) + "\n")
