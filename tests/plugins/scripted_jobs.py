"""Jobs of the scripted worker (`scripted_worker.py`), known to both sides: a plugin's own schemas."""

from __future__ import annotations

from tasks.workers.jobs import Schema, register_schema


@register_schema
class ScriptedJob(Schema):
    """What to do, and with what. See `Scripted.handle`."""

    do: str
    value: int = 0
    path: str = ""
    pause: float = 0.0
    metrics: tuple[dict[str, float | None], ...] = ()


@register_schema
class ScriptedItem(Schema):
    shard: int
    size: int = 1


@register_schema
class ScriptedAnswer(Schema):
    value: int = 0
    served: int = 0
    pid: int = 0
    folder: str = ""


@register_schema
class ScriptedDone(Schema):
    shard: int
    pid: int
