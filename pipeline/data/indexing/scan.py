"""Work on a source in units that stand for themselves: in threads or in process_pool, and kept on disk when done.

Imports neither torch nor DALI, so that the process_pool of `pipeline index` start in a moment.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import zip_longest
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.index import write_table
from pipeline.data.indexing import parquet, shards
from pipeline.data.indexing.find import Unit
from pipeline.data.indexing.rows import Header, Label, Row, read_file_header, read_header
from pipeline.errors import UserError
from pipeline.failures import READ_SOURCE_S, retry, says_of_one_file
from pipeline.storage import Storage

PART_FORMAT = 1  # part of the names of the parts: those of another version are not reused


# Of a part: the fields of a Row.
SCHEMA = pa.schema(
    {
        "file": pa.large_string(),
        "name": pa.large_string(),
        "offset": pa.int64(),
        "number": pa.int32(),
        "text": pa.large_string(),
        "size": pa.int64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "cmyk": pa.bool_(),
        "exif_rotated": pa.bool_(),
        "reason": pa.large_string(),
    }
)


def scan(unit: Unit) -> pa.Table:
    """The rows of a unit, usable or not, with the class names that its files themselves declare as metadata.

    Raises:
        UserError: a shard or a remote file cannot be read.
    """
    root = Storage(unit.root)

    def attempt() -> pa.Table:
        try:
            return _scan(root, unit)
        except FileNotFoundError as e:
            raise UserError(f"{root} lacks a file that should be there: {e}") from None
        except OSError as e:
            if not says_of_one_file(e, root.local):
                raise
            raise UserError(f"{root} has a file that cannot be read: {e}") from None

    try:
        return retry(attempt, lambda text: print(text, file=sys.stderr), READ_SOURCE_S)
    except OSError as e:
        raise UserError(f"{root} cannot be read ({e}); try again, what is done is kept") from None


def _scan(root: Storage, unit: Unit) -> pa.Table:
    names: list[str] | None = None
    if unit.kind == "images":
        rows = [_image(root, file) for file in unit.files]
    else:
        (file,) = unit.files
        with _open(root, file) as f:
            if unit.kind == "tar":
                rows = shards.read_rows(file, f)
            else:
                rows, names = parquet.read_rows(file, f)
    schema = SCHEMA.with_metadata({"names": json.dumps(names)})
    return pa.Table.from_pylist([row._asdict() for row in rows], schema)


def _open(root: Storage, file: str) -> Any:
    if root.local and not (root.local / file).is_file():  # to open a pipe would wait for its writer
        raise FileNotFoundError(f"{root.local / file} is not a file")
    f = root.open(file)
    return f if root.local else io.BufferedReader(f, 4 << 20)  # a request takes as long as some megabytes


def _image(root: Storage, file: str) -> Row:
    def header() -> Header:
        if root.local:
            return read_file_header(root.local / file, root.local)
        return read_header(io.BytesIO(root.read_bytes(file)))  # all of it: faults of the network are none of the image

    return Row.of(file, "", 0, lambda: Label(text=file.partition("/")[0]), header)


def scan_into(folder: Path, unit: Unit) -> tuple[Path, bool]:
    """Scan a unit into a file of `folder`, unless that is there; whether it was.

    Raises:
        UserError: a shard or a remote file cannot be read, or the folder cannot be written to.
    """
    part = folder / f"{_digest(unit)}.arrow"
    with contextlib.suppress(OSError, pa.ArrowInvalid):  # not there, or spoilt by a machine that went down
        read_part(part)
        return part, True
    table = scan(unit)
    try:
        write_table(table, part)
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror or e}); name another file with --out") from None
    return part, False


def _digest(unit: Unit) -> str:
    """Tells units apart, also those of the same files when they have changed."""
    root = Storage(unit.root)
    digest = hashlib.sha256(f"{PART_FORMAT} {unit.root} {unit.kind}".encode())
    for file, size in zip_longest(unit.files, unit.sizes):
        digest.update(f"\0{file}\0{_state(root, file, size)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _state(root: Storage, file: str, size: int | None) -> object:
    """What differs when the file has changed."""
    try:
        if root.local:
            status = (root.local / file).stat()
            return status.st_size, status.st_mtime_ns
        if size is None:
            with root.open(file) as f:
                size = f.seek(0, os.SEEK_END)
        return size
    except OSError as e:
        return e  # `scan` will tell of it


def read_part(part: Path) -> pa.Table:
    """The rows of a finished part."""
    with pa.OSFile(str(part)) as file:
        return pa.ipc.open_file(file).read_all()


@contextlib.contextmanager
def process_pool(number: int) -> Iterator[Executor]:
    """A pool of process_pool, which end when this one does, also when it is killed.

    Raises:
        UserError: one of them died.
    """
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a process died, perhaps for lack of memory; try fewer --workers, what is done is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all process_pool of a terminal: no tracebacks
    parent = parent_process()
    assert parent is not None

    def end_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_after_parent, daemon=True).start()
