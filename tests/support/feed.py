"""In the place of a worker's link to its supervisor: items from a list, results in a list."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from tasks.workers.metrics import Metrics


class Feed:
    def __init__(self, items: Iterable[Any] = (), report: Callable[..., None] | None = None) -> None:
        self.items, self.results = list(items), list[Any]()
        self._report = report

    def next(self) -> Any:
        return self.items.pop(0) if self.items else None

    def done(self, result: Any) -> None:
        self.results.append(result)

    def progress(self, done: int, total: int, metrics: Metrics | None = None, note: str | None = None) -> None:
        if self._report is not None:
            told = {name: value for name, value in (("metrics", metrics), ("note", note)) if value is not None}
            self._report(done, total, **told)


class InProcessPool:
    """In the place of a `WorkerPool`: handlers serve in this process. Remembers (role, job, items)."""

    def __init__(self, **handlers: Any) -> None:
        self.handlers = handlers
        self.jobs: list[tuple[str, Any, list[Any]]] = []

    def run(self, role: str, job: Any, on_progress: Any = None) -> Any:
        self.jobs.append((role, job, []))
        return self.handlers[role].handle(job, Feed((), on_progress))

    def share(
        self,
        role: str,
        job: Any,
        items: Iterable[Any],
        on_progress: Any = None,
        written: Any = None,
        on_note: Any = None,
    ) -> tuple[list[Any], list[Any]]:
        items = list(items)
        self.jobs.append((role, job, items))

        def told(done: int, total: int, metrics: Any = None, note: str | None = None) -> None:
            if on_progress:
                on_progress(done)
            if note is not None and on_note:
                on_note(note)

        feed = Feed(items, told)
        answer = self.handlers[role].handle(job, feed)
        results = {result.shard: result for result in feed.results}
        return [results[item.shard] for item in items if item.shard in results], [answer]

    def each(
        self,
        role: str,
        work: Iterable[tuple[Any, Iterable[Any]]],
        on_progress: Any = None,
        written: Any = None,
    ) -> list[Any]:
        found = []
        for number, (job, items) in enumerate(work):
            report = functools.partial(on_progress, number) if on_progress else None
            found += self.share(role, job, items, report)[1]
        return found

    def stage_done(self) -> None:
        """Nothing to end."""
