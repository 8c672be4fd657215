"""Hypothesis drives the store through random interleavings of building, crashing, damage, repair and collection, against a
model: what was planned to be in an artifact is what is read, or nothing is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pytest
from fault_trials import Trials, both_forms
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from small_store import SHARDS, rows

from storage.artifacts import shards
from storage.artifacts.artifact import artifact_directory
from storage.artifacts.digests import combine_digests, table_digest
from storage.disk import failpoints
from storage.disk.files import remove_leftovers
from storage.errors import CorruptArtifact, OpdError, StoreError
from storage.schemas import validate_table
from storage.store import ArtifactSpec, Builder, Store

SPECS = [ArtifactSpec.of("mask", 1, {"number": number}, {"rollouts": "ab" * 32}) for number in range(2)]
CONTENT = [
    {
        "mask": combine_digests(
            [(40, table_digest(validate_table("mask", rows(shard, number)))) for shard in range(SHARDS)]
        )
    }
    for number in range(2)
]
CRASHES = sorted(name for name in failpoints.NAMES if name.split(".")[0] in ("shard", "file", "manifest", "builder"))
which = st.integers(0, 1)
share = st.floats(0, 1, exclude_max=True)

evict: Callable[[Path], None] | None = None
"""What removes a committed artifact's data and keeps its manifest, where the store can do that (storage.upkeep.gc)."""
if importlib.util.find_spec("storage.upkeep.gc") is not None:
    evict = importlib.import_module("storage.upkeep.gc").evict


class StoreMachine(RuleBasedStateMachine):
    """`builders[i]` is the one that works on artifact i now."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="opd-states-"))
        self.store = Store(self.folder)
        self.builders: dict[int, tuple[Builder, ExitStack]] = {}

    # --- building ----------------------------------------------------------------------------------------------------

    def builder(self, number: int) -> Builder:
        if number not in self.builders:
            stack = ExitStack()
            self.builders[number] = stack.enter_context(self.store.building(SPECS[number])), stack
        return self.builders[number][0]

    def drop(self, number: int) -> None:
        if number in self.builders:
            self.builders.pop(number)[1].close()

    def write(self, builder: Builder, number: int, shard: int) -> None:
        writer = self.store.shard_writer(builder.stage, builder.key)
        writer.write_shard("mask", shard, rows(shard, number))

    @rule(number=which, shard=st.integers(0, SHARDS - 1))
    def write_one(self, number: int, shard: int) -> None:
        """Also one that is there already: a batch that was asked for twice."""
        builder = self.builder(number)
        if builder.committed is None:
            self.write(builder, number, shard)

    @rule(number=which)
    def finish(self, number: int) -> None:
        """What every stage does: write what is missing, commit. It must work whatever happened before."""
        builder = self.builder(number)
        for shard in builder.missing("mask", SHARDS):
            self.write(builder, number, shard)
        artifact = builder.commit(tables={"mask": SHARDS})
        self.drop(number)
        assert artifact.rows == {"mask": 40 * SHARDS}
        self.same_content(number, artifact.content)

    @rule(number=which)
    def commit_too_early(self, number: int) -> None:
        builder = self.builder(number)
        if builder.committed is None and builder.missing("mask", SHARDS):
            with pytest.raises(StoreError, match="lacks shards"):
                builder.commit(tables={"mask": SHARDS})

    @rule(number=which)
    def crash(self, number: int) -> None:
        self.drop(number)

    @rule(number=which, point=st.sampled_from(CRASHES), hit=st.integers(1, 6))
    def crash_at(self, number: int, point: str, hit: int) -> None:
        failpoints.arm({failpoints.SPEC: f"{point}=raise:KeyboardInterrupt@{hit}"})
        try:
            self.finish(number)
        except KeyboardInterrupt:
            pass
        finally:
            failpoints.arm({})
            self.drop(number)

    @rule()
    def restart(self) -> None:
        """Another process: nothing is held, nothing verified."""
        for number in list(self.builders):
            self.drop(number)
        shards._verified.clear()
        remove_leftovers(self.folder)
        self.store = Store(self.folder)

    # --- damage ------------------------------------------------------------------------------------------------------

    def file(self, part: float) -> Path | None:
        """The one that many parts of the way through all files, in an order that random names play no part in."""
        files = [path for path in (self.folder / "artifacts").glob("*/*/*") if path.is_file()]
        kind = lambda path: (path.parent.name, path.name[:10], path.name[-12:], path.stat().st_mtime_ns)  # noqa: E731
        return sorted(files, key=kind)[int(part * len(files))] if files else None

    @rule(file=share, place=share, how=st.sampled_from(["flip", "truncate", "zero", "remove"]), stamps=st.booleans())
    def damage(self, file: float, place: float, how: str, stamps: bool) -> None:
        path = self.file(file)
        if path is None:
            return
        data, stat = bytearray(path.read_bytes()), path.stat()
        if how == "remove" or not data:
            path.unlink()
            return
        at = int(place * len(data))
        if how == "flip":
            data[at] ^= 1 << at % 8
        elif how == "truncate":
            del data[at:]
        else:
            data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        path.write_bytes(data)
        if stamps:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    @rule(one_file=share, other_file=share)
    def swap(self, one_file: float, other_file: float) -> None:
        one, other = self.file(one_file), self.file(other_file)
        if one is not None and other is not None:
            first, second = one.read_bytes(), other.read_bytes()
            one.write_bytes(second)
            other.write_bytes(first)

    # --- reading -----------------------------------------------------------------------------------------------------

    def same_content(self, number: int, content: dict[str, str]) -> None:
        assert content == CONTENT[number]

    def same_rows(self, number: int, table: pa.Table) -> None:
        assert table.to_pylist() == [row for shard in range(SHARDS) for row in rows(shard, number).to_pylist()]

    @rule(number=which)
    def read(self, number: int) -> None:
        artifact = self.store.get(SPECS[number].stage, SPECS[number].key)
        if artifact is None:
            return
        self.same_content(number, artifact.content)
        try:
            table = self.store.read_table(artifact, "mask")
        except OpdError:
            return
        self.same_rows(number, table)

    @rule(number=which)
    def verify(self, number: int) -> None:
        artifact = self.store.get(SPECS[number].stage, SPECS[number].key)
        if artifact is not None and self.store.verify(artifact) == []:
            shards._verified.clear()
            self.read(number)

    @precondition(lambda self: evict is not None)
    @rule(number=which)
    def collect(self, number: int) -> None:
        """Only what nobody builds, as the collector's locks see to it."""
        artifact = self.store.get(SPECS[number].stage, SPECS[number].key)
        if artifact is not None and number not in self.builders and evict is not None:
            evict(artifact_directory(self.folder, artifact.stage, artifact.key))

    @invariant()
    def what_counts_as_committed_is_right(self) -> None:
        for number, spec in enumerate(SPECS):
            try:
                artifact = self.store.get(spec.stage, spec.key)
            except CorruptArtifact:
                continue
            if artifact is not None:
                self.same_content(number, artifact.content)

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        self.restart()
        for number in range(2):
            self.finish(number)
            self.restart()
            self.read(number)  # meets what damage no stamp shows, and then the next start mends it
            self.finish(number)
            self.restart()
            artifact = self.store.get(SPECS[number].stage, SPECS[number].key)
            assert artifact is not None and self.store.verify(artifact) == []
            self.same_rows(number, self.store.read_table(artifact, "mask"))
        assert list(self.folder.rglob(".tmp-*")) == []
        shutil.rmtree(self.folder)


@both_forms(short=1, full=40)
def test_random_interleavings(trials: Trials, count: int) -> None:
    """A trial is a seed of hypothesis with many stories: 12 in the short form, 50 longer ones in the full."""
    full = count > 1
    chosen = settings(
        max_examples=50 if full else 12,
        stateful_step_count=40 if full else 20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def attempt(name: str) -> None:
        run_state_machine_as_test(seed(int(name.split()[1]))(StoreMachine), settings=chosen)

    what = "random interleavings of build, crash, damage, repair, collect against a model (50 stories a trial)"
    trials(2, what, [f"seed {number}" for number in range(count)], attempt)
