"""A folder elsewhere (S3, GCS, another disk) through fsspec: whole files, streamed, each verified by its sha256.

fsspec and the packages behind it are imported when a `Remote` is made, and by nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from storage.disk.files import (
    explain_full_disk,
    fsync_file,
    make_directory,
    publish_exclusively,
    remove_leftovers,
    replace_atomically,
    temporary_name,
)
from storage.disk.redact import redact
from storage.errors import CorruptArtifact, OpdError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART = 8 << 20
"""Bytes that are held in memory of one transfer; an object store's parts are of this size, or larger where there would be more
than `_PARTS` of them."""
_PARTS = 9_000
_EXTRAS = {"s3": "remote", "s3a": "remote", "gs": "gcs", "gcs": "gcs"}
"""By protocol: the extra of this package that brings its client."""
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
"""Protocols whose objects appear whole or not at all; others get a temporary name first."""
_NO_CREDENTIALS = ("Credential", "ProfileNotFound", "TokenRetrieval", "UnauthorizedSSO", "SSOError")
_UNREACHABLE = (
    "EndpointConnection", "ConnectTimeout", "ReadTimeout", "ClientConnector", "ConnectionClosed", "ProxyConnection",
    "HTTPClientError", "ConnectionError", "TimeoutError", "SSLError", "gaierror",
)  # fmt: skip
Moved = Callable[[int], None]
"""Called with the bytes of each block; raises to end the transfer."""


class RemoteError(OpdError):
    """A remote that cannot be used: protocol, credentials, connection, content."""

    exit_code: ClassVar[int] = 2


class Remote:
    """A folder of an fsspec file system; `name` below is a path in it, with slashes. Safe for several threads.

    Every method raises RemoteError, in one line, for what the file system refuses."""

    def __init__(self, url: str) -> None:
        """RemoteError for a protocol that is not known or whose package is not installed. Nothing is connected to yet."""
        import fsspec

        found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", url)
        self.url = url if found and found.end() == len(url) else url.rstrip("/")
        self.protocol = found[1] if found else "file"
        if self.protocol in ("http", "https"):
            raise RemoteError(
                f"{self}: a web address holds no store; use s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a folder"
            )
        try:
            kind = fsspec.get_filesystem_class(self.protocol)
            # listings are not cached: what was read a moment ago may have changed
            self.fs: AbstractFileSystem = kind(use_listings_cache=False, **kind._get_kwargs_from_urls(self.url))
        except ImportError as error:
            extra = _EXTRAS.get(self.protocol)
            how = f"pip install 'opdflow[{extra}]'" if extra else str(error)
            raise RemoteError(f"{self}: {self.protocol}:// needs a package that is not installed: {how}") from error
        except ValueError as error:
            raise RemoteError(
                f"{self}: unknown protocol {self.protocol!r}; use s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, a folder, or another"
                " that fsspec knows"
            ) from error
        self.base = str(kind._strip_protocol(self.url)).rstrip("/")
        self.folder = Path(self.base) if self.protocol == "file" else None
        """The remote as a folder of this machine, where it is one."""
        if not self.base:
            raise RemoteError(f"{self}: names no bucket or folder")

    def __str__(self) -> str:
        return redact(self.url.removeprefix("file://"))

    def at(self, name: str) -> str:
        """The path of a file as the file system has it."""
        return f"{self.base}/{name}" if name else self.base

    # --- what is there -----------------------------------------------------------------------------------------------

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in a folder, sorted; none where it does not exist."""
        with self._explained(folder):
            try:
                found = self.fs.ls(self.at(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found} - {""})

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by its path in it."""
        with self._explained(folder):
            found = self.fs.find(self.at(folder), detail=True)
            start = len(str(self.fs._strip_protocol(self.at(folder)))) + 1
            return {str(path)[start:]: int(info["size"]) for path, info in found.items()}

    def stamp(self, name: str) -> str | None:
        """What changes when a file does (size, ETag, time); None if it does not exist."""
        with self._explained(name):
            try:
                info = self.fs.info(self.at(name))
            except FileNotFoundError:
                return None
            fields = ("size", "ETag", "etag", "mtime", "LastModified", "updated", "created")
            return " ".join(f"{field}={info[field]}" for field in fields if field in info)

    def read(self, name: str) -> bytes | None:
        """A small file whole; None if it does not exist."""
        with self._explained(name):
            try:
                return bytes(self.fs.cat_file(self.at(name)))
            except FileNotFoundError:
                return None

    def blocks(self, name: str, size: int, moved: Moved = lambda size: None) -> Iterator[bytes]:
        """A file of `size` bytes in order, `PART` bytes at a time."""
        for start in range(0, size, PART):
            with self._explained(name):
                try:
                    block = bytes(self.fs.cat_file(self.at(name), start=start, end=min(size, start + PART)))
                except FileNotFoundError as error:
                    raise RemoteError(f"{self}/{name}: missing; push it again") from error
            moved(len(block))
            yield block

    def sha256(self, name: str, size: int, moved: Moved = lambda size: None) -> str:
        """sha256 of a file, read back."""
        digest = hashlib.sha256()
        for block in self.blocks(name, size, moved):
            digest.update(block)
        return digest.hexdigest()

    # --- to and fro --------------------------------------------------------------------------------------------------

    def upload(self, source: Path, name: str, size: int, sha256: str, moved: Moved = lambda size: None) -> None:
        """A file of this machine, under its name only once it is whole, and read back.

        CorruptArtifact if the file of this machine does not have that size and sha256, RemoteError if what was read back does
        not."""
        digest = hashlib.sha256()

        def local() -> Iterator[bytes]:
            if not source.is_file():
                raise CorruptArtifact(f"{source}: missing; see `opd verify`")
            with open(source, "rb") as file:
                while block := file.read(PART):
                    digest.update(block)
                    moved(len(block))
                    yield block
            if digest.hexdigest() != sha256 or source.stat().st_size != size:
                raise CorruptArtifact(f"{source}: its bytes differ from the recorded ones; see `opd verify`")

        self._write(name, local(), size)
        if (found := self.sha256(name, size)) != sha256:
            raise RemoteError(f"{self}/{name}: read back with sha256 {found[:16]}, sent was {sha256[:16]}; push again")

    def download(
        self, name: str, target: Path, beside: Path, size: int, sha256: str, moved: Moved = lambda size: None
    ) -> None:
        """A file from there, durable under its name only once it is whole; until then it is in the folder `beside`. RemoteError
        if its bytes have another sha256."""
        make_directory(target.parent)
        temporary = beside / temporary_name()
        digest = hashlib.sha256()
        try:
            with explain_full_disk(target), open(temporary, "xb") as file:
                for block in self.blocks(name, size, moved):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != sha256:
                raise RemoteError(
                    f"{self}/{name}: its bytes have sha256 {digest.hexdigest()[:16]}, recorded is {sha256[:16]}; it is damaged"
                    " there: push it again from a store that has it whole"
                )
            fsync_file(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes) -> None:
        """Writes a small file; one that is there is replaced at once."""
        with self._explained(name, writes=True):
            if self.folder is not None:
                make_directory((self.folder / name).parent)
                return replace_atomically(self.folder / name, data)
            self._write(name, iter([data]), len(data))

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file under a free name, or returns False if the name is taken."""
        with self._explained(name, writes=True):
            if self.folder is not None:
                make_directory((self.folder / name).parent)
                return publish_exclusively(self.folder / name, data)
            try:
                self.fs.pipe_file(self.at(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def remove_leftovers(self) -> None:
        """Removes temporary files of killed processes of this machine; an object store has none."""
        if self.folder is not None and self.folder.is_dir():
            remove_leftovers(self.folder, ("", "artifacts/*/*/", "runs/*/"))

    def _write(self, name: str, blocks: Iterator[bytes], size: int) -> None:
        """Writes a file that appears under its name only once it is whole."""
        with self._explained(name, writes=True):
            if self.protocol in _WHOLE:
                if size <= PART:
                    self.fs.pipe_file(self.at(name), b"".join(blocks))
                else:
                    self._write_parts(name, blocks, size)
                return
            temporary = self.at(temporary_name())
            self.fs.makedirs(self.at(name).rpartition("/")[0], exist_ok=True)
            try:
                with self.fs.open(temporary, "wb") as file:
                    for block in blocks:
                        file.write(block)
                if self.folder is not None:
                    fsync_file(Path(temporary))
                    Path(temporary).replace(self.folder / name)
                else:
                    self.fs.mv(temporary, self.at(name))
            except BaseException:
                with suppress(Exception):
                    self.fs.rm_file(temporary)
                raise

    def _write_parts(self, name: str, blocks: Iterator[bytes], size: int) -> None:
        part = max(PART, -(-size // _PARTS))
        file = self.fs.open(self.at(name), "wb", block_size=part, autocommit=False)
        try:
            for block in blocks:
                file.write(block)
            file.close()
        except BaseException:
            with suppress(Exception):
                file.discard()
            raise
        file.commit()

    @contextmanager
    def _explained(self, name: str, writes: bool = False) -> Iterator[None]:
        """Converts what clients raise to a RemoteError of one line. FileNotFoundError passes where nothing is written."""
        try:
            yield
        except OpdError:
            raise
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            where = f"{self}/{name}" if name else str(self)
            first = redact((str(error).strip() or type(error).__name__).splitlines()[0])
            if _any_of(_NO_CREDENTIALS, kinds):
                raise RemoteError(f"{self}: no credentials ({first}); {_credentials(self.protocol)}") from error
            if isinstance(error, PermissionError):
                raise RemoteError(f"{where}: refused ({first}); {_credentials(self.protocol)}") from error
            if _any_of(_UNREACHABLE, kinds):
                raise RemoteError(
                    f"{self}: not reachable ({first}); check address and network, then run it again: what was sent is kept"
                ) from error
            if isinstance(error, FileNotFoundError):
                if not writes and "bucket" not in first.lower():
                    raise
                raise RemoteError(f"{self}: no such bucket or folder ({first}); make it first") from error
            if isinstance(error, (OSError, ValueError)) or _any_of(("ClientError", "HttpError", "BotoCore"), kinds):
                raise RemoteError(f"{where}: {first}") from error
            raise


def _any_of(names: tuple[str, ...], kinds: list[str]) -> bool:
    return any(name in kind for kind in kinds for name in names)


def _credentials(protocol: str) -> str:
    if protocol in ("s3", "s3a"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for another server than AWS's), or AWS_PROFILE"
    if protocol in ("gs", "gcs"):
        return "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login"
    return "check its permissions"


MIRROR = "remote.json"
"""In a folder that mirrors the records of a remote: its address."""


def mirrored(root: Path) -> Remote | None:
    """The remote whose records a folder mirrors; None for a store of its own."""
    found = address(root)
    return None if found == str(root) else Remote(found)


def address(root: Path) -> str:
    """A store's folder, or the address of the remote whose records the folder mirrors."""
    try:
        return str(json.loads((root / MIRROR).read_bytes())["url"])
    except (FileNotFoundError, NotADirectoryError):
        return str(root)


def remote_of(text: str | Path) -> Remote:
    """The remote of a command line: a URL, or a folder of this machine."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(text))
    if found is None:
        return Remote(f"file://{Path(text).expanduser().absolute()}")
    slashes = "///" if found[1] == "file" else "//"
    return Remote(f"{found[1]}:{slashes}{str(text)[found.end() :]}")  # a Path has lost a slash
