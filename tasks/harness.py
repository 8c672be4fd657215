"""Harness: measures a student on a task of lm-eval. A worker runs lm-eval on the model; this module names and commits."""

from __future__ import annotations

from typing import Any

from storage.identity import Identity
from storage.store import ArtifactSpec, Builder
from tasks.inputs.harness import HarnessConfig, HarnessTask
from tasks.stage import Context, Student, Work, model_inputs
from tasks.workers.jobs import ArtifactRef, HarnessJob, ModelRef, config_json

VERSION = 1
STAGE = "harness"
RESULTS = "harness_results"
SAMPLES = "harness_samples"


class _HarnessIdentity(Identity):
    config: HarnessConfig
    lm_eval: str


def harness_work(task: HarnessTask, student: Student) -> Work:
    """One task, group or tag of lm-eval on one student.

    Output "harness": tables harness_results and harness_samples, each of one shard. Meta: `metrics`, see `metrics_of`."""
    identity = _HarnessIdentity(config=task.config, lm_eval=task.version)
    spec = ArtifactSpec.of(STAGE, VERSION, identity, model_inputs(student, "student:") | {"task": task.digest})

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, task, student)

    return Work(STAGE, {STAGE: spec}, build)


def _build(builder: Builder, ctx: Context, task: HarnessTask, student: Student) -> None:
    missing = [table for table in (RESULTS, SAMPLES) if builder.missing(table, 1)]
    for table in missing:
        for note in builder.begin_shards(table, ctx.runtime.numerics(STAGE), [0], 1):
            ctx.say(STAGE, note)
    meta: dict[str, Any] = {}
    if missing:
        job = HarnessJob(
            store=str(ctx.store.root),
            target=ArtifactRef(builder.stage, builder.key),
            model=ModelRef.of(ctx.store, student),
            config=config_json(task.config),
            digest=task.digest,
            folder=None if task.folder is None else str(task.folder),
            tables=missing,
        )

        def report(done: int, total: int, *_: Any, **__: Any) -> None:
            ctx.progress(done, total, "requests")

        ctx.workers.run(STAGE, job, report)
    if not builder.repairing:
        meta = {"metrics": metrics_of(task.config.task, _results(builder))}
    provenance = builder.shard_numerics(RESULTS, 1)
    builder.commit(meta=meta, tables={RESULTS: 1, SAMPLES: 1}, provenance=provenance)


def _results(builder: Builder) -> list[dict[str, Any]]:
    from storage.artifacts.shards import read_parquet

    (file,) = builder.finished(RESULTS, 1)
    rows: list[dict[str, Any]] = read_parquet(file).to_pylist()
    return rows


def metrics_of(name: str, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """The results as metrics: METRIC, or where lm-eval filters answers METRIC,FILTER; of a task inside the group or tag `name`
    with /TASK behind it. Each with its error as lm-eval gives it, METRIC_se, and METRIC_n documents."""
    found: dict[str, float | None] = {}
    for row in results:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']},{row['filter']}"
        metric = metric if row["task"] == name else f"{metric}/{row['task']}"
        found |= {metric: row["value"], f"{metric}_se": row["se"], f"{metric}_n": float(row["n"])}
    return found
