"""What an engine refuses to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from overriding_jobs import SpoiltGradient

from tasks.workers.metrics import silent
from tasks.workers.pool import Worker


@pytest.mark.promise(7, "a gradient that is not finite changes no weight")
def test_a_gradient_that_is_not_finite_changes_no_weight(trainers: dict[int, Worker]) -> None:
    found = trainers[1].run(SpoiltGradient(), silent, timeout=120).kinds
    assert len(found) == 8
    for kind in found:
        first, bad, after = kind["norms"]
        assert first > 0 and bad is None and after > 0, kind
        assert kind["same"] == [True, False], kind


def test_ranks_meet_in_the_workers_folder_whatever_its_name(trainers: dict[int, Worker]) -> None:
    """The fixture's folder has `#`, `?`, `%` and a space in its name: nothing is written to a path cut at one of them."""
    meeting = trainers[2]._folder / "ranks"
    assert meeting.is_file() and "#" in str(meeting)
    cut = Path(str(meeting).partition("#")[0])
    assert not [path for path in cut.parent.glob(f"{cut.name}*") if path.is_file()]
