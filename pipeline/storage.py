"""Where runs are kept: a directory that every node mounts, or a prefix of an object store.

The only file that imports `pyarrow.fs`, which reads the same URIs as Ray does: /path, s3://, gs://, ...
Everything that goes wrong is an OSError.
"""

import contextlib
import getpass
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")


class Storage:
    """A folder of a file system or an object store; `/` goes down into it.

    Args:
        uri: a path, or a URI that pyarrow reads, such as s3://bucket/runs?region=eu-west-1.
    """

    def __init__(self, uri: str | Path):
        text = str(uri)
        path = text.removeprefix("file://") if text.startswith("file://") or "://" not in text else None
        self.local = Path(path).absolute() if path is not None else None
        self.uri = str(self.local) if self.local else text

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Storage":
        if self.local:
            return Storage(self.local / name)
        parts = urlsplit(self.uri)
        return Storage(parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl())

    @property
    def name(self) -> str:
        return urlsplit(self.uri).path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Storage":
        if self.local:
            return Storage(self.local.parent)
        parts = urlsplit(self.uri)
        return Storage(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]).geturl())

    @property
    def scratch(self) -> Path:
        """A directory of this machine for what belongs to this folder: itself, where it is one."""
        if self.local:
            return self.local
        digest = hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"pipeline-{getpass.getuser()}", f"{self.name}-{digest}")

    def check(self) -> None:
        """ValueError for a URI that pyarrow does not know."""
        _ = self._opened

    def make(self) -> None:
        """Make the folder, and check that it can be written to."""
        if self.local:
            self.local.mkdir(parents=True, exist_ok=True)
            os.utime(self.local)  # as a write would, this fails where the file system is read-only
        else:
            self.write_bytes(".writable", b"")

    def names(self) -> list[str]:
        """What is in the folder, sorted; nothing where it does not exist."""
        return sorted(info.base_name for info in self._list())

    def sizes(self) -> dict[str, int]:
        """The files in the folder with their sizes in bytes."""
        return {info.base_name: info.size for info in self._list() if info.is_file}

    def _list(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        system, path = self._opened
        try:
            return list(system.get_file_info(FileSelector(path, allow_not_found=True)))
        except NotADirectoryError:
            return []

    def read_bytes(self, name: str) -> bytes:
        """A file's content; FileNotFoundError where there is none."""
        system, path = self._opened
        with system.open_input_file(f"{path}/{name}") as f:
            return bytes(f.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Make or replace a file: it is whole, or as it was before."""
        if self.local:
            temporary = self.local / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            fsync(temporary)
            temporary.replace(self.local / name)
            return
        system, path = self._opened
        with system.open_output_stream(f"{path}/{name}") as f:
            f.write(content)

    def upload(self, source: Path, name: str) -> None:
        """Copy a file of this machine into the folder."""
        from pyarrow.fs import LocalFileSystem, copy_files

        system, path = self._opened
        copy_files(str(source), f"{path}/{name}", LocalFileSystem(), system)

    def download(self, name: str, to: Path) -> None:
        """Copy a file of the folder to this machine; what is there is replaced, also under its readers."""
        from pyarrow.fs import LocalFileSystem, copy_files

        system, path = self._opened
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{to.name}.{os.getpid()}")
        copy_files(f"{path}/{name}", str(temporary), system, LocalFileSystem())
        temporary.replace(to)

    def fetch(self) -> Path:
        """This as a file of this machine: itself, or a copy that is made once."""
        if self.local:
            return self.local
        folder, name = self.parent, self.name
        copy = folder.scratch / name
        if not copy.exists() or copy.stat().st_size != folder.sizes()[name]:
            folder.download(name, copy)
        return copy

    def remove(self) -> None:
        """Delete the folder and all that is in it, if it exists."""
        if self.local:
            shutil.rmtree(self.local, ignore_errors=True)
            return
        system, path = self._opened
        with contextlib.suppress(FileNotFoundError):
            system.delete_dir(path)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The pyarrow file system, and the folder's path in it; ValueError for a URI it does not know."""
        from pyarrow.fs import FileSystem

        system, path = FileSystem.from_uri(self.local.as_uri() if self.local else self.uri)
        return system, path


def patiently(action: Callable[[], T], report: Callable[[str], None], patience_s: float) -> T:
    """What `action` returns; while the storage does not answer, it is tried again for `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    for pause in pauses():
        try:
            return action()
        except OSError as e:
            if time.monotonic() + pause > deadline:
                raise
            report(f"the storage does not answer, trying again in {pause} s: {e}")
            time.sleep(pause)
    raise AssertionError("the pauses never end")


def pauses() -> Iterator[int]:
    """Seconds to wait after each failed try."""
    yield from (1, 2, 5)
    yield from repeat(10)


def fsync(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
