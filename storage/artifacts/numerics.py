"""The settings (numerics) with which each shard of an unfinished artifact was made.

An artifact may be started with some settings and finished with others; its finished shards are kept. A sealed file beside them
records the settings of each, for the manifest. It is durable before the first shard is made, and removed when the artifact is
committed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.disk.files import remove, replace_atomically, seal, unseal
from storage.errors import CorruptArtifact

MADE_AT = ".made-at.json"
INTERMEDIATE = "intermediate"
"""Folder of an unfinished artifact for shards that one worker writes and another reads; no manifest names them."""
NUMERICS = "numerics"
BY_SHARD = "numerics_by_shard"
"""Names in an artifact's provenance: the settings of all its shards; or, where there are several sets or where they are
not known, a list of {shards, numerics (null: not known)}."""
_MADE_AGAIN = "intermediate shards were made with other settings ({}) and are made again"
_SHOWN = 6

Settings = dict[str, Any]


class ShardNumerics:
    """The numerics of one table's shards. Hold the artifact's lock."""

    def __init__(self, folder: Path, table: str) -> None:
        self.path = folder / f"{table}{MADE_AT}"
        self.table = table
        self.sets, self.shards, self.now = self._read()

    def begin(self, settings: Mapping[str, Any], missing: Iterable[int], count: int) -> list[str]:
        """Record that the `missing` ones of `count` shards will be made with `settings`. Returns warnings for the user."""
        before = self.now
        absent = set(missing)
        have = {shard: self.shards.get(shard, before) for shard in range(count) if shard not in absent}
        if settings not in self.sets:
            self.sets.append(dict(settings))
        now = self.sets.index(dict(settings))
        # first: after a kill here, intermediate shards must not count as made with the new settings
        dropped = now != before and remove(self.path.with_name(INTERMEDIATE))
        if now != before or absent & self.shards.keys():
            self.shards, self.now = have, now
            content = {"sets": self.sets, "shards": {str(k): v for k, v in have.items()}, "now": now}
            replace_atomically(self.path, seal(content))
        said = []
        if now != before and absent and any(index != now for index in have.values()):
            said.append(
                f"warning: {self.table}: {len(have)} of {count} shards were made with other settings"
                f" ({self._difference(before, now)}); they are kept, but `opd replay` cannot repeat what was made at two"
            )
        if dropped:
            said.append(f"warning: {self.table}: {_MADE_AGAIN.format(self._difference(before, now))}")
        return said

    def groups(self, count: int) -> list[tuple[Settings | None, list[int]]]:
        """(settings, or None where they are not known; shards made at them), in the order of their first shards."""
        found: dict[int | None, list[int]] = {}
        for shard in range(count):
            found.setdefault(self.shards.get(shard, self.now), []).append(shard)
        return [(None if index is None else self.sets[index], shards) for index, shards in found.items()]

    def provenance(self, count: int) -> dict[str, Any]:
        """For the manifest, see `NUMERICS` and `BY_SHARD`."""
        groups = self.groups(count)
        if len(groups) == 1 and groups[0][0] is not None:
            return {NUMERICS: groups[0][0]}
        return {BY_SHARD: [{"shards": shards, NUMERICS: settings} for settings, shards in groups]}

    def _read(self) -> tuple[list[Settings], dict[int, int | None], int | None]:
        """Empty where there is no record or it is damaged."""
        try:
            content = unseal(self.path)
        except (FileNotFoundError, CorruptArtifact):
            return [], {}, None
        return content["sets"], {int(shard): index for shard, index in content["shards"].items()}, content["now"]

    def _difference(self, before: int | None, now: int) -> str:
        return "not recorded" if before is None else differing([self.sets[before], self.sets[now]])


def begin_repair(folder: Path, table: str, settings: Mapping[str, Any]) -> list[str]:
    """Record the settings at which a repair makes intermediate shards, apart from those of the artifact's shards. Intermediate
    shards of an earlier attempt at other settings, or at unknown ones, are removed. Returns warnings for the user."""
    record = ShardNumerics(folder, f"{table}.repair")
    before = None if record.now is None else record.sets[record.now]
    if before == settings:
        return []
    said = []
    if remove(folder / INTERMEDIATE):  # first: after a kill here, none may count as made with the new settings
        how = "not recorded" if before is None else differing([before, dict(settings)])
        said.append(f"warning: {table}: {_MADE_AGAIN.format(how)}")
    replace_atomically(record.path, seal({"sets": [dict(settings)], "shards": {}, "now": 0}))
    return said


def differing(sets: list[Settings]) -> str:
    """The settings that differ, as text: "threads 1, 2"."""
    names = sorted({name for settings in sets for name in settings})
    unlike = [name for name in names if any(settings.get(name) != sets[0].get(name) for settings in sets)]
    return "; ".join(f"{name} {', '.join(str(settings.get(name)) for settings in sets)}" for name in unlike)


def several(provenance: Mapping[str, Any]) -> str | None:
    """Which shards of an artifact were made at which settings, as text; None where all were made at the same."""
    groups = provenance.get(BY_SHARD)
    if groups is None:
        return None
    known = [group[NUMERICS] for group in groups if group[NUMERICS] is not None]
    lines = []
    for group in groups:
        settings, shards = group[NUMERICS], group["shards"]
        unlike = {k: v for k, v in (settings or {}).items() if any(other.get(k) != v for other in known)}
        at = "settings that were not recorded" if settings is None else ", ".join(f"{k} {v}" for k, v in unlike.items())
        more = f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else ""
        lines.append(f"shards {', '.join(map(str, shards[:_SHOWN]))}{more} at {at or 'those that were recorded'}")
    return "; ".join(lines)
