"""Shares artifacts with another store on this machine: by hard link where possible, else by copy."""

from __future__ import annotations

from storage.artifacts.artifact import MANIFEST, Artifact, artifact_directory, load_manifest
from storage.disk.files import explain_full_disk, link, replace_atomically
from storage.errors import CorruptArtifact
from storage.store import Store


def lend(source: Store, artifact: Artifact, target: Store) -> None:
    """Adds a committed artifact to `target` too. Files are shared by hard link; trees outside the source stay in place.

    Raises Evicted if the data was removed, CorruptArtifact if a file is missing. Verify first: damage would be shared."""
    source.require_data(artifact)
    here = artifact_directory(source.root, artifact.stage, artifact.key)
    there = artifact_directory(target.root, artifact.stage, artifact.key)
    manifest = load_manifest(here)
    if manifest is None:
        raise CorruptArtifact(f"{here}: removed during the transfer; run again")
    names = [record.file for record in manifest.shards]
    for tree in manifest.trees.values():
        if not tree.external:
            names += [f"{tree.directory}/{file.path}" for file in tree.files]
    with explain_full_disk(there):
        there.mkdir(parents=True, exist_ok=True)
        for name in names:
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            link(here / name, there / name)
        replace_atomically(there / MANIFEST, manifest.dump())
