"""A batch of completions under way: what is finished, what is missing, and why. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from storage.artifacts.parts import Parts
from storage.errors import ConfigError, OpdError

_SHOWN = 5


class SamplingFailed(OpdError):
    """The engine gave no usable completion for some samples, however often it was asked."""


@dataclass(frozen=True)
class Completion:
    """One completion. `logprobs` has one value per token id, under the distribution that was sampled from."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]


_FIELDS = {field.name for field in fields(Completion)}


class Batch:
    """One completion per name, prompt and seed. With `parts`, every finished one outlives this process, and those that
    an earlier process finished are `kept`."""

    def __init__(
        self, names: Sequence[str], prompts: list[list[int]], seeds: list[int], parts: Parts | None = None
    ) -> None:
        if not len(names) == len(prompts) == len(seeds) == len(set(names)):
            raise ConfigError(f"sampler: {len(prompts)} prompts, {len(seeds)} seeds, {len(set(names))} different names")
        self.names, self.prompts, self.seeds = list(names), prompts, seeds
        self._parts = parts
        self._wrong: dict[int, str] = {}
        found = parts.read() if parts is not None else {}
        self._done = {
            index: Completion(**found[name])
            for index, name in enumerate(self.names)
            if name in found and found[name].keys() == _FIELDS
        }
        self.kept = len(self._done)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def done(self) -> int:
        """How many are finished."""
        return len(self._done)

    @property
    def missing(self) -> list[int]:
        """The numbers of those that are not finished, in order."""
        return [index for index in range(len(self)) if index not in self._done]

    def accept(self, finished: Mapping[int, Completion]) -> None:
        """These are finished, and stay so if this process dies now."""
        if not finished:
            return
        if self._parts is not None:
            self._parts.add({self.names[index]: asdict(completion) for index, completion in finished.items()})
        self._done.update(finished)

    def refuse(self, indices: Sequence[int], problem: str) -> None:
        """These were asked for in vain."""
        self._wrong.update(dict.fromkeys(indices, problem))

    def completions(self) -> list[Completion]:
        """All of them, in the order of the names; nothing is missing by then."""
        return [self._done[index] for index in range(len(self))]

    def failed(self) -> SamplingFailed:
        """Says which samples are missing, and why."""
        missing = self.missing
        shown = ", ".join(f"{self.names[i]} (seed {self.seeds[i]}): {self._wrong.get(i)}" for i in missing[:_SHOWN])
        more = f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return SamplingFailed(f"{len(missing)} of {len(self)} samples failed at every try: {shown}{more}")
