"""Which stage of the main path made each artifact, so that evicted artifacts can be rebuilt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from storage.store import Artifact, ArtifactSpec, Store
from tasks.plugins import refuse_changed
from tasks.stage import Context, Work


@dataclass(frozen=True)
class Origin:
    """One call of a stage: its work, inputs and outputs."""

    round: int
    label: str
    work: Work
    inputs: tuple[Artifact, ...]
    made: Mapping[str, Artifact]


@dataclass(frozen=True)
class Rebuild:
    """Evicted outputs of one stage that must be rebuilt."""

    origin: Origin
    lost: dict[str, Artifact]

    @property
    def needs(self) -> tuple[Artifact, ...]:
        return (*self.origin.inputs, *self.lost.values())


@dataclass
class Lineage:
    """All stages called so far, in order. An input always comes from an earlier stage."""

    store: Store
    _all: list[Origin] = field(default_factory=list)

    def note(self, round: int, label: str, work: Work, inputs: Iterable[Any], made: Mapping[str, Artifact]) -> None:
        self._all.append(Origin(round, label, work, tuple(artifacts_in(inputs)), made))

    def find(self, round: int, label: str) -> Origin | None:
        """The stage with this label in a round, or None."""
        return next((origin for origin in self._all if (origin.round, origin.label) == (round, label)), None)

    def to_restore(self, wanted: Iterable[Artifact]) -> list[Rebuild]:
        """The stages to repeat, in order, so that no artifact of `wanted` is evicted any more."""
        needed = self._evicted(wanted)
        rebuilds = []
        for origin in reversed(self._all):
            if needed & {(a.stage, a.key) for a in origin.made.values()}:
                # all evicted outputs at once: one training gives both student and state
                gone = self._evicted(origin.made.values())
                lost = {name: a for name, a in origin.made.items() if (a.stage, a.key) in gone}
                rebuilds.append(Rebuild(origin, lost))
                needed -= {(a.stage, a.key) for a in lost.values()}
                needed |= self._evicted(origin.inputs)
        return rebuilds[::-1]

    def _evicted(self, artifacts: Iterable[Artifact]) -> set[tuple[str, str]]:
        return {(a.stage, a.key) for a in artifacts if self.store.evicted(a) is not None}


def artifacts_in(values: Iterable[Any]) -> Iterator[Artifact]:
    """The artifacts among a stage's arguments, including those in mappings."""
    for value in values:
        if isinstance(value, Artifact):
            yield value
        elif isinstance(value, Mapping):
            yield from artifacts_in(value.values())


def rebuild(
    work: Work, artifacts: Mapping[str, Artifact], context: Context, waiting: Any = None
) -> dict[str, Artifact]:
    """Builds these outputs of a stage in the context's store, unless they are committed there. Returns the artifacts.

    The spec comes from the artifact, because another one than requested may have served (a larger top-K)."""
    made: dict[str, Artifact] = {}
    with ExitStack() as stack:
        builders = {}
        for _, _, name in sorted((a.stage, a.key, name) for name, a in artifacts.items()):
            builder = stack.enter_context(context.store.building(spec_of(artifacts[name], work.outputs[name]), waiting))
            if builder.committed is None:
                builders[name] = builder
            else:
                made[name] = builder.committed
        if builders:
            require_plugins(work, builders)
            work.build(builders, context)
        for name, builder in builders.items():
            if builder.committed is None:
                raise RuntimeError(f"{work.stage}: the stage returned without committing {builder.stage}/{builder.key}")
            made[name] = builder.committed
    return made


def require_plugins(work: Work, names: Iterable[str]) -> None:
    """InputError when a plugin that these outputs depend on has changed (for example one of a fork's parent)."""
    for name in names:
        spec = work.outputs[name]
        refuse_changed(spec.identity.get("plugins") or {}, f"{spec.stage}/{spec.key}")


def spec_of(artifact: Artifact, output: ArtifactSpec) -> ArtifactSpec:
    """The spec that an artifact was made to; `output` is that of the stage's output that it serves, with its tables."""
    return output.model_copy(update={name: getattr(artifact, name) for name in ("version", "identity", "inputs")})
