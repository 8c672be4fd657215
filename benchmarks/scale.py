"""How cost grows: prompts of a run, and shards of an artifact, each from small to large, with nothing but the store and the
tokenizer at work.

python benchmarks/scale.py [--prompts 1000 10000 100000 1000000] [--shards 250 1000 4000 16000]

Each size runs in a process of its own. Prints one CSV row per step: CPU seconds, microseconds per item, and the growth of the
process's peak memory in MiB. What grows no faster than its data has equal microseconds in all rows of a step."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.artifacts import shards as shard_files
from storage.artifacts.batches import BATCHES, BatchLog
from storage.query.catalog import Catalog
from storage.store import ArtifactSpec, Store

ROWS, TOKENS = 2, 8
"""Samples of a shard, and tokens of a sample: small, so that what is paid per shard shows."""
SPEC = ArtifactSpec.of("mask", 1, {"policy": "scale"}, {"rollouts": "ab" * 32})


class Table:
    """Measures steps, and prints a row for each."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count = what, count

    def step(self, name: str, do: Callable[[], Any]) -> Any:
        """Do it, and print what it took."""
        peak, begun, wall = _peak(), time.process_time(), time.perf_counter()
        result = do()
        took, lasted = time.process_time() - begun, time.perf_counter() - wall
        micro = 1e6 * took / self.count
        grown = _peak() - peak
        print(f"{self.what},{self.count},{name},{took:.3f},{micro:.1f},{lasted:.2f},{grown:.0f}", flush=True)
        return result


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def of_prompts(count: int, folder: Path) -> None:
    """Prompts from a file: read, rendered, tokenised, committed; the plan of a round that takes them all; the lengths that a
    check reads."""
    from tasks.inputs.prompts import PrepareConfig
    from tasks.inputs.rounds import prompts_for_round
    from tasks.inputs.tokenizers import build_byte_tokenizer
    from tasks.prepare import prepare
    from tasks.rollout import plan_samples
    from tasks.rollout_config import RolloutConfig
    from tasks.stage import Context

    table = Table("prompts", count)
    file = folder / "train.jsonl"
    with open(file, "w") as out:
        for number in range(count):
            out.write(json.dumps({"prompt": f"What is {number} + {number * 7 % 1000}?", "answer": str(number)}) + "\n")
    model = folder / "model"
    build_byte_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 264}))
    config = PrepareConfig.model_validate({"train": {"kind": "file", "path": str(file)}, "chat_template": False})
    context: Any = Context.__new__(Context)
    object.__setattr__(context, "say", lambda *_: None)
    object.__setattr__(context, "log", lambda *_: None)
    object.__setattr__(context, "progress", lambda *_: None)
    made = table.step("prepare", lambda: prepare(config, model, {None: model}, context))
    ids = made.prompts["prompt_id"].to_pylist()
    chosen = table.step("choose a round's prompts", lambda: prompts_for_round(ids, 0, 1, count))
    table.step("plan its samples", lambda: plan_samples(chosen, RolloutConfig(prompts_per_round=count), 0, 1))


def of_shards(count: int, folder: Path) -> None:
    """An artifact of many shards: written, found again by another process, committed, read, queried."""
    table = Table("shards", count)
    store = Store(folder / "store")
    reasons = [[0] * TOKENS] * ROWS

    def write() -> None:
        writer = store.shard_writer(SPEC.stage, SPEC.key)
        log = BatchLog(writer.path, "mask")
        for shard in range(count):
            log.add(shard, shard)
            log.writing(shard)
            names = [f"p{shard}/{row}" for row in range(ROWS)]
            writer.write_shard("mask", shard, pa.table({"sample_id": names, "mask_reasons": reasons}))

    with store.building(SPEC):
        table.step("write", write)
    shard_files._verified.clear()  # as in a new process
    with store.building(SPEC) as builder:
        assert table.step("find after a kill", lambda: builder.missing("mask", count)) == []
        provenance = builder.batches("mask", count)
        assert sum(len(entry["shards"]) for entry in provenance[BATCHES]) == count
        table.step("commit", lambda: builder.commit(tables={"mask": count}, provenance=provenance))
    store = Store(folder / "store")
    table.step("find committed", lambda: store.get(SPEC.stage, SPEC.key))
    artifact = store.require(SPEC.stage, SPEC.key)
    rows = table.step("read", lambda: store.read_table(artifact, "mask"))
    assert rows.num_rows == ROWS * count
    found = table.step("query", lambda: Catalog(store).query("SELECT count(*) AS n FROM supervision", 600))
    assert found.num_rows == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--shards", type=int, nargs="*", default=[250, 1_000, 4_000, 16_000])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            {"prompts": of_prompts, "shards": of_shards}[options.one[0]](int(options.one[1]), Path(folder))
        return
    print("what,count,step,cpu_s,us_each,wall_s,peak_growth_mib", flush=True)
    for what in ("prompts", "shards"):
        for count in getattr(options, what):
            subprocess.run([sys.executable, __file__, "--one", what, str(count)], check=True)


if __name__ == "__main__":
    main()
