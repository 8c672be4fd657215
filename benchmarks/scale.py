"""How cost grows: each of these from small to large, with nothing but our own code at work, without a model's forward.

    prompts     of a run: read, rendered, tokenised, chosen, planned; per prompt
    shards      of an artifact: written, found again, committed, read, queried; per shard
    catalogue   of a run with many rounds, 10,000 shards each: planned, resumed, listed, queried; per shard of the run
    lengths     of completions, at equal numbers of tokens: a round is read by the trainer and made into micro-batches; per token
    lists       entries K of a teacher's list: the same; per entry
    vocabulary  rows of logits to answers: top 64, nucleus 0.9, entropy; per logit
    weights     MiB of a checkpoint: its digest; per MiB. `read` is the file alone, from the page cache

python benchmarks/scale.py [--prompts 1000 10000 100000 1000000] [--shards 250 1000 4000 16000] [--lengths ...] ...

Each size runs in a process of its own. Prints one CSV row per step: CPU seconds, microseconds per item, and the growth of the
process's peak memory in MiB. What grows no faster than its data has equal microseconds in all rows of a step."""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from record import record

from storage.artifacts import shards as shard_files
from storage.artifacts.artifact import MANIFEST, Manifest, ShardRecord, artifact_directory, load_manifest
from storage.artifacts.batches import BATCHES, BatchLog
from storage.artifacts.digests import combine_digests
from storage.artifacts.shards import SIDECAR
from storage.disk.files import seal
from storage.query.catalog import Catalog
from storage.runs import RoundState, Run, StageState
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store

ROWS, TOKENS = 2, 8
"""Samples of a shard, and tokens of a sample: small, so that what is paid per shard shows."""
TOKENS_OF_A_ROUND = 131_072
HERE = Path(__file__).resolve().parent
SPEC = ArtifactSpec.of("mask", 1, {"policy": "scale"}, {"rollouts": "ab" * 32})


class Table:
    """Measures steps, and prints a row for each."""

    def __init__(self, what: str, count: int, items: int | None = None) -> None:
        """`items`: what the microseconds are per; `count` by default."""
        self.what, self.count, self.items = what, count, items or count

    def step(self, name: str, do: Callable[[], Any]) -> Any:
        """Do it, and print what it took."""
        peak, begun, wall = _peak(), _cpu(), time.perf_counter()
        result = do()
        took, lasted = _cpu() - begun, time.perf_counter() - wall
        micro = 1e6 * took / self.items
        grown = _peak() - peak
        print(f"{self.what},{self.count},{name},{took:.4f},{micro:.3g},{lasted:.2f},{grown:.0f}", flush=True)
        return result


def _cpu() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + waited.ru_utime + waited.ru_stime  # os.times() counts in steps of 10 ms


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


def of_catalogue(count: int, folder: Path) -> None:
    """A store with a run of `count` shards: names, manifests as they are, files that share their contents between rounds. It is
    planned, continued, listed and queried as by a new process, first without and then with what the store remembers of its
    manifests."""
    root = folder / "store"
    rounds = max(1, count // (len(STAGES) * SHARDS_OF_AN_ARTIFACT))
    table = Table("catalogue", rounds * len(STAGES) * SHARDS_OF_AN_ARTIFACT)
    table.step("make it", lambda: make_catalogue(root, rounds))
    time.sleep(2.1)  # what is younger than two seconds is not remembered
    names = [
        name for r in Run.open(root, "big").state.rounds for s in r.stages.values() for name in s.artifacts.items()
    ]
    for when in ("for the first time", "again"):
        found = table.step(f"plan: find all that is done {when}", lambda: [Store(root).get(*name) for name in names])
        assert None not in found
    for words in (("ls",), ("status", "big", "--json")):
        command = [sys.executable, "-m", "flows.cli.app", *words, "--root", str(root)]
        table.step(f"opd {' '.join(words)}", lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))  # noqa: B023
    for what, sql, rows in (
        ("bytes by stage", "SELECT stage, sum(bytes) FROM artifacts GROUP BY ALL", len(STAGES)),
        ("rounds", "SELECT round FROM rounds", rounds + 1),
        (
            "tokens of a round",
            f"SELECT sum(len(mask_reasons)) FROM supervision WHERE round = {rounds} AND run = 'big'",
            1,
        ),
    ):
        answer = table.step(f"query: {what}", lambda: Catalog(Store(root)).query(sql, 600))  # noqa: B023
        assert answer.num_rows == rows
    unfinished(root, names[-1])
    with Store(root).building(spec_of(rounds, STAGES[-1])) as builder:
        lost = table.step(
            "resume: find what an unfinished artifact lacks", lambda: builder.missing("mask", SHARDS_OF_AN_ARTIFACT)
        )
        assert lost == [7]


STAGES = ("rollout", "sampled", "teacher_topk", "mask")
SHARDS_OF_AN_ARTIFACT = 2_500


def spec_of(round: int, stage: str) -> ArtifactSpec:
    return ArtifactSpec.of(stage, 1, {"catalogue": round}, {})


def make_catalogue(root: Path, rounds: int) -> None:
    """Round 0 and `rounds` rounds of four artifacts; the files of later rounds are links to those of round 1."""
    store, states = Store(root), [RoundState(round=0, student_sha256="00" * 32)]
    written: dict[str, list[tuple[ShardRecord, Path]]] = {}
    for round in range(1, rounds + 1):
        made = {}
        for stage in STAGES:
            table = "rollouts" if stage == "rollout" else stage
            spec = spec_of(round, stage)
            with store.building(spec) as builder:
                if round == 1:
                    records = [
                        builder.write_shard(table, shard, rows_of(table, shard, ROWS, TOKENS))
                        for shard in range(SHARDS_OF_AN_ARTIFACT)
                    ]
                    for sidecar in builder.path.glob(f"*{SIDECAR}"):
                        sidecar.unlink()
                    written[stage] = [(record, builder.path / record.file) for record in records]
                else:
                    records = [record for record, _ in written[stage]]
                    for record, source in written[stage]:
                        os.link(source, builder.path / record.file)
                content = {table: combine_digests([(r.rows, r.row_digest) for r in records])}
                artifact = Artifact(
                    stage=stage, key=spec.key, content=content, rows={table: ROWS * len(records)}, identity=spec.identity,
                    inputs={}, created=f"2026-01-01T00:00:{round % 60:02d}Z", seconds=1.0,
                )  # fmt: skip
                (builder.path / MANIFEST).write_bytes(Manifest(artifact=artifact, shards=tuple(records)).dump())
            made[stage] = StageState(key=spec.key, state="done", seconds=1.0, artifacts={stage: spec.key})
        states.append(RoundState(round=round, student_sha256=f"{round:064x}", stages=made))
    run = Run.create(root, "big", {"seed": 0}, {"seed": 0})
    with run.lock():
        state = run.state
        state.status, state.rounds = "stopped", states
        run.save(state)


def rows_of(table: str, shard: int, rows: int, tokens: int) -> pa.Table:
    """A shard's rows: the values 1 in every column, lists of `tokens` entries; sample_ids of its own."""
    schema = schema_for(table)

    def value(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return [value(kind.value_type)] * tokens
        return "1" if pa.types.is_string(kind) else kind.to_pandas_dtype()(1)

    columns = {field.name: [value(field.type)] * rows for field in schema}
    columns["sample_id"] = [f"p{shard * rows + row}/1/0" for row in range(rows)]
    return pa.table(columns, schema)


def unfinished(root: Path, name: tuple[str, str]) -> None:
    """Takes an artifact back to where a kill left it: shards with sidecars, one of them missing."""
    folder = artifact_directory(root, *name)
    manifest = load_manifest(folder)
    assert manifest is not None
    for shard in manifest.shards:
        (folder / f"{shard.file}{SIDECAR}").write_bytes(seal(shard.model_dump(mode="json")))
    (folder / manifest.shards[7].file).unlink()
    (folder / MANIFEST).unlink()


def of_lengths(length: int, folder: Path) -> None:
    """Completions of `length` tokens, as many as make the same number of tokens."""
    _round(Table("lengths", length, items=TOKENS_OF_A_ROUND), folder, length, 64)


def of_lists(k: int, folder: Path) -> None:
    """Lists of K entries, of equally many tokens."""
    _round(Table("lists", k, items=TOKENS_OF_A_ROUND * k // 4), folder, 256, k, share=4)


def _round(table: Table, folder: Path, length: int, k: int, share: int = 1) -> None:
    """A round is stored, read as the trainer reads it, and made into micro-batches of 8,192 tokens or one completion."""
    sys.path.append(str(HERE.parent / "tests" / "support"))
    import torch
    from synthetic_round import VOCABULARY, make_round, train_job

    from tasks.losses.config import DirectConfig, TopkSupport
    from tasks.trainer.batching import plan_steps, split_step
    from tasks.trainer.data import forward_batch, loss_denominators
    from tasks.trainer.reading import collect_round
    from tasks.workers.jobs import ArtifactRef

    samples = TOKENS_OF_A_ROUND // share // length
    store, rollouts, signals = make_round(folder, samples, length, k, per_shard=max(1, samples // 8))
    objective = DirectConfig(support=TopkSupport(k=k, outside="bucket"))
    places = {name: [ArtifactRef.of(made)] for name, made in signals.items()}
    job = train_job(folder, ArtifactRef.of(rollouts), places, objective)
    read = table.step(
        "read a round", lambda: collect_round(job, objective.needs(), [], VOCABULARY, store, folder).mapped()
    )

    def micro_batches() -> None:
        for step in plan_steps(0, 1, len(read), 8, len(read)):
            weights = loss_denominators(read, step.rows, "token", None)
            (micros,) = split_step(read.forward_lengths[list(step.rows)].tolist(), 1, 8192)
            for micro in micros:
                forward_batch(read, step.rows, weights, micro.places, micro.filler, torch.device("cpu"))
            read.drop_pages()

    table.step("make micro-batches", micro_batches)


def of_vocabulary(rows: int, folder: Path) -> None:
    """Logits of 64 tokens over `rows` ids, peaked as a language model's."""
    import torch

    from tasks.engines import onepass
    from tasks.engines.teacher import Vocabulary
    from tasks.signals import Ask

    tokens = 64
    logits = torch.randn(tokens, rows, generator=torch.Generator().manual_seed(0)) * 10
    ids = torch.zeros(tokens, dtype=torch.long)
    ask = Ask(logprobs=True, entropy=True, top=frozenset({64}), sampling={"temperature": 1.0, "top_p": 0.9, "top_k": 0})
    vocabulary = Vocabulary(rows, rows)
    onepass.answer(logits.clone(), None, ids, ids, ask, vocabulary, {})  # fills caches
    table = Table("vocabulary", rows, items=10 * tokens * rows)
    copies = [logits.clone() for _ in range(10)]
    table.step(
        "logits to answers", lambda: [onepass.answer(one, None, ids, ids, ask, vocabulary, {}) for one in copies]
    )


def of_weights(mib: int, folder: Path) -> None:
    """A checkpoint of `mib` MiB in one file."""
    import torch
    from safetensors.torch import save_file

    from storage.artifacts.digests import weights_digest

    save_file({f"layer.{i}": torch.randn(2**18) for i in range(mib)}, folder / "model.safetensors")
    table = Table("weights", mib)

    def read() -> None:
        with open(folder / "model.safetensors", "rb") as file:
            while file.read(2**20):
                pass

    table.step("read", read)
    table.step("digest", lambda: weights_digest(folder))


SIZES: dict[str, tuple[Callable[[int, Path], None], list[int]]] = {
    "prompts": (of_prompts, [1_000, 10_000, 100_000, 1_000_000]),
    "shards": (of_shards, [250, 1_000, 4_000, 16_000]),
    "catalogue": (of_catalogue, [10_000, 100_000, 1_000_000]),
    "lengths": (of_lengths, [128, 1_024, 4_096, 16_384]),
    "lists": (of_lists, [16, 64, 256]),
    "vocabulary": (of_vocabulary, [8_192, 32_768, 151_936]),
    "weights": (of_weights, [64, 256, 1_024]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for what, (_, counts) in SIZES.items():
        parser.add_argument(f"--{what}", type=int, nargs="*", default=counts)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            SIZES[options.one[0]][0](int(options.one[1]), Path(folder))
        return
    print("what,count,step,cpu_s,us_each,wall_s,peak_growth_mib", flush=True)
    for what in SIZES:
        each: dict[str, list[float]] = {}
        for count in getattr(options, what):
            child = [sys.executable, __file__, "--one", what, str(count)]
            lines = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(lines, end="", flush=True)
            for row in csv.reader(lines.splitlines()):
                each.setdefault(row[2], []).append(float(row[4]))
        counts = getattr(options, what)
        for step, micro in each.items() if len(counts) > 1 else ():
            name = f"{step}, {what}: CPU time of each of {counts[-1]:,}, of each of {counts[0]:,}"
            record(name, [micro[-1] / micro[0]], "about 1 or less")


if __name__ == "__main__":
    main()
