"""What the tests of real runs read of one: stored tables, and what a replay and a verification say."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
from opd_cli import opd

from storage.runs import Run
from storage.store import Store


def table_of(root: Path, name: str, round: int, label: str, stage: str, table: str) -> pa.Table:
    """A table of the artifact `stage` that the stage `label` of a run's round made."""
    key = Run.open(root, name).state.rounds[round].stages[label].artifacts[stage]
    store = Store(root)
    return store.read_table(store.require(stage, key), table)


def replays(root: Path, name: str, round: int, *stages: str) -> set[str]:
    """Replays a round (`stages`: these alone) and verifies the run. The stages of the artifacts, all of which came out equal."""
    chosen = ("--stages", ",".join(stages)) if stages else ()
    results = json.loads(opd("replay", name, "--round", round, *chosen, "--json", root=root).stdout)
    assert results and all(result["identical"] for result in results), results
    assert opd("verify", name, root=root).returncode == 0
    return {result["artifact"].split("/")[0] for result in results}
