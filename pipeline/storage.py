"""Where runs are kept: a directory that every node mounts, or a prefix of an object store.

URIs are those that pyarrow reads, as Ray does (/path, s3://, gs://, ...), http(s)://, to read from, and what fsspec has
a package for on this machine. Everything that goes wrong is an OSError.
"""

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pipeline.local_files import alone, fsync, remove_leftovers, scratch_folder, temporary_name

PIECE_BYTES = 32 * 2**20


class Storage:
    """A folder of a file system or an object store; `/` goes down into it.

    Args:
        uri: a path, or a URI that pyarrow or fsspec reads, such as s3://bucket/runs?region=eu-west-1.
    """

    def __init__(self, uri: str | Path):
        text = str(uri)
        path = text.removeprefix("file://") if text.startswith("file://") or "://" not in text else None
        self.local = Path(path).absolute() if path is not None else None
        self.uri = str(self.local) if self.local else text

    def __str__(self) -> str:
        return self.uri

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri,)  # a connection does not travel

    def __truediv__(self, name: str) -> "Storage":
        if self.local:
            return Storage(self.local / name)
        parts = urlsplit(self.uri)
        return Storage(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl())

    @property
    def name(self) -> str:
        if self.local:
            return self.local.name
        return unquote(urlsplit(self.uri).path.rstrip("/").rpartition("/")[2])

    @property
    def parent(self) -> "Storage":
        if self.local:
            return Storage(self.local.parent)
        parts = urlsplit(self.uri)
        return Storage(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]).geturl())

    @property
    def local_dir(self) -> Path:
        """A directory of this machine for what belongs to this folder: itself, where it is one."""
        if self.local:
            return self.local
        digest = hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        return scratch_folder() / f"{self.name}-{digest}"

    def check(self) -> None:
        """ValueError for a URI of a kind that is not known."""
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

    def changed(self) -> float | None:
        """When something was last written into the folder itself, Unix time; None where nothing tells."""
        times = [info.mtime.timestamp() for info in self._list() if info.mtime is not None]
        return max(times, default=None)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Path relative to the folder, and size in bytes, of every file in it and below, sorted by path.

        Nothing where it does not exist. On the web, what the folder's page links to; each file's size is a request.
        """
        start = len(self._opened[1].rstrip("/")) + 1
        yield from sorted((info.path[start:], info.size) for info in self._list(recursive=True) if info.is_file)

    def _list(self, recursive: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        system, path = self._opened
        try:
            return list(system.get_file_info(FileSelector(path, allow_not_found=True, recursive=recursive)))
        except NotADirectoryError:
            return []

    def open(self, name: str) -> Any:
        """A file to read anywhere in, with `read`, `seek` and `tell`; FileNotFoundError where there is none.

        Of a remote one each read is a request: put an `io.BufferedReader` around it for many small ones. To seek
        past the end may be an OSError.
        """
        if self.local:
            return (self.local / name).open("rb")
        system, path = self._opened
        return system.open_input_file(f"{path}/{name}")

    def read_bytes(self, name: str) -> bytes:
        """A file's content; FileNotFoundError where there is none."""
        system, path = self._opened
        with system.open_input_file(f"{path}/{name}") as f:
            return bytes(f.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Make or replace a file: it is whole, or as it was before."""
        if self.local:
            temporary = self.local / temporary_name(name)
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
        remove_leftovers(to.parent, glob.escape(to.name))
        temporary = to.with_name(temporary_name(to.name))
        # One request for each piece: by pyarrow's own size, 1 MiB, a ResNet-152's checkpoint takes 700, one by one.
        copy_files(f"{path}/{name}", str(temporary), system, LocalFileSystem(), chunk_size=PIECE_BYTES)
        temporary.replace(to)

    def fetch(self) -> Path:
        """This as a file of this machine: itself, or a copy that is made once; FileNotFoundError if there is none."""
        if self.local:
            return self.local
        system, path = self._opened
        (info,) = system.get_file_info([path])
        if not info.is_file:
            raise FileNotFoundError(f"no file {self}")
        copy = self.parent.local_dir / self.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with alone(copy.parent):  # the first of a machine's processes fetches it for all
            written = int(info.mtime.timestamp()) if info.mtime else 0  # some file systems have whole seconds
            status = copy.stat() if copy.exists() else None
            if status is None or (status.st_size, int(status.st_mtime)) != (info.size, written):
                self.parent.download(self.name, copy)
                os.utime(copy, (written, written))  # so that no clock but the store's counts
        return copy

    def delete(self, name: str) -> None:
        """Delete a file of the folder, if it exists."""
        system, path = self._opened
        with contextlib.suppress(FileNotFoundError):
            system.delete_file(f"{path}/{name}")

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
        """The pyarrow file system, and the folder's path in it; ValueError for a URI that is not known."""
        from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

        if self.uri.startswith(("http://", "https://")):
            from pipeline.http_storage import web_folder

            return web_folder(self.uri)
        try:
            system, path = FileSystem.from_uri(self.local.as_uri() if self.local else self.uri)
        except ValueError:
            with contextlib.suppress(ValueError, ImportError):  # a kind it does not know, or has no package for
                from fsspec.core import url_to_fs

                system, path = url_to_fs(self.uri)
                # What others write is to be seen at once: fsspec would keep its listings for as long as the process.
                system.dircache.use_listings_cache = False
                return PyFileSystem(FSSpecHandler(system)), path
            raise
        return system, path
