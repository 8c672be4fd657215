"""The loop that sharded stages share: plan, find missing shards, record the numerics, have workers write them, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from storage.artifacts.batches import Batch
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
        self._label = label
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
        self._unit = "samples" if all(number == 1 for number in passes.values()) else "sample passes"
        self._total = sum(size * passes.get(shard, 1) for shard, size in enumerate(self.sizes))
        self._done = self._total - sum(self.sizes[shard] * passes[shard] for shard in passes)
        self.ctx.progress(self._done, self._total, self._unit)

    def run(
        self,
        role: str,
        job: Schema,
        items: Sequence[Item],
        written: Callable[[int], bool] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Run a job over items, one shard each. Returns (results of the items, results of the workers). `written`: whether the
        job's output of a shard is there; by default, that of all tables."""
        before = self._done

        def report(done: int) -> None:
            self.ctx.progress(min(before + done, self._total), self._total, self._unit)

        def note(text: str) -> None:
            self.ctx.say(self._label, text)

        found = self.ctx.workers.share(role, job, items, report, written or self._written, note)
        self._done = min(before + sum(item.size for item in items), self._total)
        return found

    def sample(
        self,
        table: str,
        job: SampleJob,
        shards: Mapping[int, SampleShard],
        missing: Sequence[int],
        recorded: Mapping[str, Any] | None = None,
    ) -> list[SampleResult]:
        """Have samplers write the `missing` shards. A shard whose rows are recorded is sampled again in its batch, so that it
        is equal bit for bit, and each of these batches on one worker; all other shards share one queue, and each worker samples
        one batch. `recorded`: the provenance that has the batches, where it is not `table`'s own."""
        builder = self._outputs[table]
        between = builder.intermediate()
        written = (lambda shard: between.read("rollouts", shard) is not None) if job.intermediate else self._written
        recorded = self.ctx.recorded.get((builder.stage, builder.key), recorded)
        again = builder.batches_to_repeat(table, missing, recorded)
        results = self._repeat(job, shards, again, written)
        repeated = {shard for batch in again for shard in batch.shards}
        if rest := [shards[shard] for shard in missing if shard not in repeated]:
            workers = self.ctx.runtime.sampler.workers
            job = msgspec.structs.replace(job, share=-(-sum(item.size for item in rest) // workers))
            results += self.run("sampler", job, rest, written)[1]
        return results

    def _repeat(
        self,
        job: SampleJob,
        shards: Mapping[int, SampleShard],
        batches: Sequence[Batch],
        written: Callable[[int], bool],
    ) -> list[SampleResult]:
        work = [
            (
                msgspec.structs.replace(job, batch=[step for _, step in batch.queue], write=batch.shards),
                [shards[shard] for shard, _ in batch.queue],
            )
            for batch in batches
        ]
        # most of a batch's samples may be there already: it counts as done at the samples that it writes
        limits = [sum(self.sizes[shard] for shard in batch.shards) for batch in batches]
        before, counted = self._done, [0] * len(batches)

        def report(number: int, done: int) -> None:
            counted[number] = min(done, limits[number])
            self.ctx.progress(min(before + sum(counted), self._total), self._total, self._unit)

        def there(number: int, shard: int) -> bool:
            return shard not in batches[number].shards or written(shard)

        results = self.ctx.workers.each("sampler", work, report, there)
        self._done = min(before + sum(limits), self._total)
        return results

    def _written(self, shard: int) -> bool:
        return all(shard not in builder.missing(name, len(self.sizes)) for name, builder in self._outputs.items())

    def batches(self, table: str) -> dict[str, Any]:
        """The batches that the shards of a sampled table were in, for `commit`."""
        return self._outputs[table].batches(table, len(self.sizes))

    def commit(self, table: str, meta: Mapping[str, Any], batches: Mapping[str, Any] | None = None) -> None:
        """Publish a table, with the numerics of its shards (and where they were sampled their `batches`) in the provenance. A
        repaired artifact keeps what was recorded."""
        builder, count = self._outputs[table], len(self.sizes)
        self.ctx.progress(self._total, self._total, self._unit)
        provenance = builder.shard_numerics(table, count) | dict(batches or {})
        builder.commit(meta=meta, tables={table: count}, provenance=provenance)


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once, in order."""
    return [value for index, value in enumerate(values) if value not in values[:index]]
