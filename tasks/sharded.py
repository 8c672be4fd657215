"""The loop that sharded stages share: plan, find missing shards, record the numerics, have workers write them, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from storage.store import Builder
from tasks.stage import Context
from tasks.workers.jobs import SampleJob, SampleResult, SampleShard, Schema
from tasks.workers.pool import Item


class ShardedStage:
    """The tables of a stage, all with the same shards. `sizes`: samples per shard; `outputs`: table -> its builder.

    Raises CorruptArtifact where a damaged shard cannot be set aside."""

    def __init__(
        self, ctx: Context, label: str, sizes: Sequence[int], outputs: Mapping[str, Builder], roles: Sequence[str]
    ) -> None:
        self.ctx, self.sizes, self._outputs = ctx, list(sizes), dict(sorted(outputs.items()))
        self.absent = {name: set(builder.missing(name, len(sizes))) for name, builder in self._outputs.items()}
        self.missing = sorted(set().union(*self.absent.values()))
        there = sum(size for shard, size in enumerate(sizes) if shard not in self.missing)
        if self.missing and there:
            ctx.say(label, f"{there} of {sum(sizes)} samples are there already")
        self.expect(dict.fromkeys(self.missing, 1))
        for name, builder in self._outputs.items():
            numerics = ctx.runtime.numerics(*roles)
            for note in builder.begin_shards(name, numerics, sorted(self.absent[name]), len(sizes)):
                ctx.say(label, note)

    def expect(self, passes: Mapping[int, int]) -> None:
        """Set how many passes workers make over each missing shard (default 1), for progress."""
        self._total = sum(size * passes.get(shard, 1) for shard, size in enumerate(self.sizes))
        self._done = self._total - sum(self.sizes[shard] * passes[shard] for shard in passes)
        self.ctx.progress(self._done, self._total, "samples")

    def run(
        self,
        role: str,
        job: Schema,
        items: Sequence[Item],
        together: bool = False,
        written: Callable[[int], bool] | None = None,
        limit: int | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Run a job over items, one shard each. Returns (results of the items, results of the workers). `written`: whether the
        job's output of a shard is there; by default, that of all tables. `limit`: the samples that are done afterwards, where
        some items are not missing themselves."""
        before, limit = self._done, self._total if limit is None else limit

        def report(done: int) -> None:
            self.ctx.progress(min(before + done, limit), self._total, "samples")

        found = self.ctx.workers.share(role, job, items, report, together, written or self._written)
        self._done = min(before + sum(item.size for item in items), limit)
        return found

    def sample(
        self, table: str, job: SampleJob, shards: Mapping[int, SampleShard], missing: Sequence[int]
    ) -> list[SampleResult]:
        """Have samplers write the `missing` shards. A shard whose rows are recorded is sampled again in its batch, so that it
        is equal bit for bit; all others share one queue, and each worker samples one batch."""
        builder = self._outputs[table]
        results: list[SampleResult] = []
        again = builder.batches_to_repeat(table, missing, self.ctx.recorded.get((builder.stage, builder.key)))
        for batch in again:
            steps = [step for _, step in batch.queue]
            repeat = msgspec.structs.replace(job, batch=steps, write=batch.shards)
            items = [shards[shard] for shard, _ in batch.queue]
            limit = self._done + sum(self.sizes[shard] for shard in batch.shards)
            _, answers = self.run("sampler", repeat, items, together=True, limit=limit)
            results += answers
        repeated = {shard for batch in again for shard in batch.shards}
        if rest := [shards[shard] for shard in missing if shard not in repeated]:
            workers = self.ctx.runtime.sampler.workers
            job = msgspec.structs.replace(job, share=-(-sum(item.size for item in rest) // workers))
            between = builder.intermediate()
            written = (lambda shard: between.read("rollouts", shard) is not None) if job.intermediate else None
            results += self.run("sampler", job, rest, written=written)[1]
        return results

    def _written(self, shard: int) -> bool:
        return all(shard not in builder.missing(name, len(self.sizes)) for name, builder in self._outputs.items())

    def commit(self, table: str, meta: Mapping[str, Any], sampled: bool = False) -> None:
        """Publish a table, with the numerics of its shards (and where it was `sampled` their batches) in the provenance. A
        repaired artifact keeps what was recorded."""
        builder, count = self._outputs[table], len(self.sizes)
        self.ctx.progress(self._total, self._total, "samples")
        provenance = builder.shard_numerics(table, count) | (builder.batches(table, count) if sampled else {})
        builder.commit(meta=meta, tables={table: count}, provenance=provenance)


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once, in order."""
    return [value for index, value in enumerate(values) if value not in values[:index]]
