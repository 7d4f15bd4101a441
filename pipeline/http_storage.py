"""Files on a web server, to read: fsspec's HTTP client as a pyarrow file system. Imported late, by `storage` alone.

Everything that goes wrong is an OSError; of an answer 404, a FileNotFoundError.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from pyarrow import PythonFile
from pyarrow.fs import FileInfo, FileSelector, FileType, FSSpecHandler, PyFileSystem

# A server that ignores Range requests sends the whole file for any part of it; of a large one that would never end.
MAX_WHOLE = 256 * 2**20
# Not of a whole transfer, which may be long: of its beginning, and of any pause in it.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
# Compressed on the way, a file would have another length.
HEADERS = {"Accept-Encoding": "identity"}


def web_folder(uri: str) -> tuple[PyFileSystem, str]:
    """The server as a file system, and the folder's path in it."""
    parts = urlsplit(uri)
    return PyFileSystem(_Web(f"{parts.scheme}://{parts.netloc}", parts.query)), unquote(parts.path).rstrip("/")


class _Web(FSSpecHandler):  # type: ignore[misc]
    """One server; paths are plain, not percent-encoded; `query` goes with every file, as signed URLs need it."""

    def __init__(self, origin: str, query: str):
        super().__init__(
            HTTPFileSystem(
                simple_links=False,
                client_kwargs={"timeout": TIMEOUT, "trust_env": True},
                headers=HEADERS,
                encoded=True,
            )
        )
        self._origin, self._query = origin, query

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._file_info(path, allow_not_found=True) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """What a folder's page links to in that folder; nothing where the page is no such list."""
        try:
            names = self._names(selector.base_dir)
        except FileNotFoundError:
            if not selector.allow_not_found:
                raise
            return []
        paths = {f"{selector.base_dir}/{name.rstrip('/')}": name.endswith("/") for name in names}
        with ThreadPoolExecutor(16) as pool:
            infos = list(pool.map(self._file_info, [path for path, is_folder in paths.items() if not is_folder]))
        for folder in (path for path, is_folder in paths.items() if is_folder):
            infos.append(FileInfo(folder, FileType.Directory))
            if selector.recursive:
                infos += self.get_file_info_selector(FileSelector(folder, recursive=True))
        return infos

    def open_input_file(self, path: str) -> PythonFile:
        return PythonFile(_WebFile(self.fs, self._url(path), self._file_info(path).size), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        raise OSError(f"{self._url(path)}: a web server cannot be written to")

    def _url(self, path: str) -> str:
        return f"{self._origin}{quote(path)}" + (f"?{self._query}" if self._query else "")

    def _names(self, folder: str) -> list[str]:
        """The entries of a folder's page; those of folders end in a slash."""
        url = f"{self._origin}{quote(folder)}/"
        with _os_errors(url):
            links = self.fs.ls(url, detail=False)
        inside = [link.removeprefix(url) for link in links if link.startswith(url)]
        plain = [name for name in inside if not set("?#") & set(name) and "/" not in name.rstrip("/")]
        return sorted({unquote(name) for name in plain if name.strip("./")})

    def _file_info(self, path: str, allow_not_found: bool = False) -> FileInfo:
        try:
            return FileInfo(path, FileType.File, size=self.fs.info(self._url(path))["size"])
        except FileNotFoundError as e:  # fsspec's word for all that goes wrong here
            cause = e.__cause__
            if not isinstance(cause, aiohttp.ClientResponseError) or cause.status not in (404, 410):
                raise OSError(f"{self._url(path)}: {cause or e}") from e
            if not allow_not_found:
                raise
            return FileInfo(path, FileType.NotFound)


class _WebFile(io.RawIOBase):
    """A file to read anywhere in; each read is one request."""

    def __init__(self, fs: HTTPFileSystem, url: str, size: int | None):
        self._fs, self._url, self._position = fs, url, 0
        self._whole: bytes | None = None
        if size is None:  # the server does not say; what it sends is all there is
            self._whole = self._get(None)
            size = len(self._whole)
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start >= stop:
            return 0
        data = self._part(start, stop)
        if len(data) != stop - start:
            raise OSError(f"{self._url}: {len(data)} bytes came of {stop - start}")
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def _part(self, start: int, stop: int) -> bytes:
        if self._whole is None:
            data = self._get((start, stop))
            if len(data) <= stop - start:
                return data
            self._whole = data
        return self._whole[start:stop]

    def _get(self, part: tuple[int, int] | None) -> bytes:
        """The bytes of a part, or all of them where the server does not send parts."""
        headers = HEADERS | ({"Range": f"bytes={part[0]}-{part[1] - 1}"} if part else {})

        async def get() -> bytes:
            session = await self._fs.set_session()
            async with session.get(self._fs.encode_url(self._url), headers=headers) as answer:
                self._fs._raise_not_found_for_status(answer, self._url)
                if part and answer.status != 206 and (answer.content_length or 0) > MAX_WHOLE:
                    raise OSError(f"{self._url}: the server does not send parts of files (Range requests)")
                return bytes(await answer.read())

        with _os_errors(self._url):
            data: bytes = sync(self._fs.loop, get)
            return data


@contextmanager
def _os_errors(url: str) -> Iterator[None]:
    """aiohttp's errors as OSErrors."""
    try:
        yield
    except aiohttp.ClientError as e:
        raise OSError(f"{url}: {e or type(e).__name__}") from e
