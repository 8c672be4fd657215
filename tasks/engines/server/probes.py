"""Which model a server has: fixed sequences of token ids, and the record of their log-probabilities in the store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.disk.files import unseal
from storage.errors import CorruptArtifact, InputError
from storage.identity import canonical_json, derive_seed
from tasks.engines.teacher import Host, Passage, ServerTeacher, Vocabulary
from tasks.signals import Ask

RECORDS = "teachers"
"""Folder of the store with what teachers behind a server answered to the probes."""
PROBES = 2
PROBE_TOKENS = 16
TOLERANCE = {"float32": 1e-3}
"""By the server's dtype: mean difference of the probes' log-probabilities, in nats, that rounding explains."""
TOLERANCE_LOW_PRECISION = 0.1


class OtherTeacher(InputError):
    """The server answers as another model than the one that is recorded."""


def probe_sequences(rows: int) -> list[list[int]]:
    """Token ids that are the same in every run; a function of the vocabulary's size alone."""
    return [[derive_seed("served", i, j) % rows for j in range(PROBE_TOKENS)] for i in range(PROBES)]


def record_path(store: Path, weights: str, backend: ServerTeacher) -> Path:
    name = hashlib.sha256(canonical_json([weights, backend.model]).encode()).hexdigest()[:16]
    return store / RECORDS / f"{name}.json"


def recorded(store: Path, weights: str, backend: ServerTeacher) -> dict[str, Any] | None:
    """What the server of this teacher answered, or must answer, to the probes; None before it was asked. CorruptArtifact, with
    what to do, for a damaged record."""
    path = record_path(store, weights, backend)
    try:
        return unseal(path)
    except FileNotFoundError:
        return None
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}; remove it, then the next start records the server's answers again") from error


def refuse_other(
    expected: Sequence[float], found: Sequence[float], dtype: str, backend: ServerTeacher, record: Path
) -> None:
    """OtherTeacher for answers to the probes that differ by more than rounding."""
    gap = float(np.abs(np.array(expected) - np.array(found)).mean()) if len(expected) == len(found) else math.inf
    limit = TOLERANCE.get(dtype, TOLERANCE_LOW_PRECISION)
    if not gap <= limit:
        raise OtherTeacher(
            f"supervise.teacher: the server's {backend.model!r} is not the model that was asked before: its log-probabilities of"
            f" the probes differ by {gap:.3g} nats on average (at most {limit:g} in {dtype}; {record}). Serve the old model and"
            " `opd resume`; for another teacher, name it in `teacher:`, or under another supervise.teacher.model"
        )


def of_checkpoint(folder: Path, dtype: str, host: Host, rows: int) -> list[float]:
    """Log-probabilities of the probes by transformers: once per store and teacher."""
    from tasks.engines.local import LocalModel

    passages = [Passage(np.array(ids[:1]), np.array(ids[1:])) for ids in probe_sequences(rows)]
    model = LocalModel(folder, dtype, host)
    try:
        found = model.score(passages, Ask(logprobs=True), Vocabulary(rows, rows), {})
    finally:
        model.close()
    return finite([float(value) for array in found["logprobs"] for value in array], str(folder))


def finite(values: list[float], what: str) -> list[float]:
    """The log-probabilities of the probes; InputError for a model that gives none to ids of its own vocabulary."""
    if not all(map(math.isfinite, values)):
        raise InputError(
            f"supervise.teacher: {what} gives log-probabilities that are not finite to ids of its vocabulary"
        )
    return values
