"""A folder with the records of a remote store (runs, manifests), so that whatever reads a store reads the remote.

The records come when a command starts, and only those that changed. Shards stay where they are: queries read them there by
ranges, small tables are fetched when they are read, each verified. Nothing is ever written to the remote."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.artifacts.artifact import KEY, MANIFEST, NAME, artifact_directory
from storage.disk.files import make_directory, remove, replace_atomically
from storage.disk.remote import MIRROR, Remote
from storage.runs import RECORDS, Run, run_directory
from storage.upkeep.remote_layout import TRANSFERS, folder_of, require_store, run_at, run_names


def mirror(remote: Remote) -> Path:
    """The folder, in the user's cache, with the records as they are now. RemoteError where the remote is no store or cannot be
    read."""
    require_store(remote)
    root = cache() / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    make_directory(root / "artifacts")
    make_directory(root / "runs")
    replace_atomically(root / MIRROR, json.dumps({"url": remote.url}).encode())
    stages = [name for name in remote.names("artifacts") if NAME.fullmatch(name)]
    with ThreadPoolExecutor(TRANSFERS, "mirror") as pool:
        keys = pool.map(lambda stage: [(stage, key) for key in remote.names(f"artifacts/{stage}")], stages)
        names = [name for part in keys for name in part if KEY.fullmatch(name[1])]
        list(pool.map(lambda name: _manifest(remote, root, name), names))
        runs = [run for run in pool.map(lambda name: run_at(remote, name), run_names(remote)) if run is not None]
    for run in runs:
        folder = run_directory(root, run.name)
        make_directory(folder)
        for file in RECORDS:
            if not (folder / file).exists() or (folder / file).read_bytes() != run.files[file]:
                replace_atomically(folder / file, run.files[file])
    for gone in {run.name for run in Run.list(root)} - {run.name for run in runs}:
        remove(run_directory(root, gone))
    return root


def cache() -> Path:
    """`opdflow/remotes` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opdflow" / "remotes"


def _manifest(remote: Remote, root: Path, name: tuple[str, str]) -> None:
    where, directory = f"{folder_of(name)}/{MANIFEST}", artifact_directory(root, *name)
    stamp, kept = remote.stamp(where), directory / "stamp"
    if stamp is None:  # being pushed
        return
    if kept.exists() and kept.read_text() == stamp and (directory / MANIFEST).exists():
        return
    data = remote.read(where)
    if data is not None:
        make_directory(directory)
        replace_atomically(directory / MANIFEST, data)
        replace_atomically(kept, stamp.encode())
