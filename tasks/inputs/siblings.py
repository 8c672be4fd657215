"""Which context a sample gets: the first template that it has every column for, with each of its siblings in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.identity import derive_seed
from tasks.inputs.contexts import DEFAULT_THRESHOLD, SiblingConfig, columns_of, lacking
from tasks.inputs.rows import Row


@dataclass(frozen=True)
class Correct:
    """A correct completion of a round, and what a sibling's context shows of it."""

    sample_id: str
    sample_index: int
    text: str
    shown: str


@dataclass(frozen=True)
class Verdicts:
    """What the judge said of a round, by sample_id; without a reward there is no verdict."""

    rewards: Mapping[str, float]
    feedback: Mapping[str, str]
    threshold: float = DEFAULT_THRESHOLD

    def correct(self, sample_id: str) -> bool:
        return self.rewards.get(sample_id, float("-inf")) >= self.threshold

    def of(self, sample_id: str) -> dict[str, str]:
        """The columns that a sample has whatever its siblings are."""
        found = {"feedback": self.feedback[sample_id]} if sample_id in self.feedback else {}
        if sample_id in self.rewards:
            found["verdict"] = "correct" if self.correct(sample_id) else "incorrect"
        return found


@dataclass(frozen=True)
class Candidate:
    """One context that a sample may get."""

    template: str
    found: Mapping[str, str]
    sibling_id: str | None = None


def source_of(template: str) -> str:
    """What of the round a template shows."""
    names = set(columns_of(template))
    if {"sibling", "feedback"} <= names:
        return "both"
    return next((name for name in ("sibling", "feedback") if name in names), "prompt")


def candidates(
    row: Row,
    templates: Sequence[str],
    own: Mapping[str, str],
    siblings: Sequence[Correct],
    reasons: list[str],
) -> Iterator[Candidate]:
    """The contexts that a sample can have, best first. `own`: its columns of the round, `siblings`: in order of preference. Every
    column that keeps a template from being used is added to `reasons`."""
    for template in templates:
        each: list[tuple[dict[str, str], str | None]] = [(dict(own), None)]
        if "sibling" in columns_of(template) and siblings:
            each = [({**own, "sibling": other.shown}, other.sample_id) for other in siblings]
        for found, sibling_id in each:
            if missing := lacking(row, template, found):
                reasons += [f"no {name}" for name in missing]
                break  # it is missing with every sibling
            yield Candidate(template, found, sibling_id)


def siblings_of(
    sample_id: str, text: str, group: Sequence[Correct], sibling: SiblingConfig, seed: int
) -> list[Correct]:
    """The correct completions of the group that a sample may be shown, best first: not its own, and nothing whose text, or whose
    shown part, is the sample's own text (the teacher would copy it)."""
    others = [
        other for other in group if other.sample_id != sample_id and other.text != text and other.shown != text.strip()
    ]
    if sibling.rule == "first":
        return sorted(others, key=lambda other: other.sample_index)
    return sorted(others, key=lambda o: (derive_seed(seed, "sibling", sample_id, o.sample_id), o.sample_index))
