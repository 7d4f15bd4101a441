"""Row groups of Parquet files, of which nothing less can be read, as bytes in which each image has its offset."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from pipeline.data.indexing.parquet import image_column
from pipeline.failures import DamagedError
from pipeline.storage import Storage

OFFSET_BYTES = 8


def row_group_ends(root: Storage, file: str) -> list[int]:
    """How many rows there are up to the end of each row group.

    Raises:
        OSError: the file is gone, or not a Parquet file.
    """
    with _open(root, file) as source:
        return list(accumulate(source.metadata.row_group(k).num_rows for k in range(source.num_row_groups)))


def read_group(root: Storage, file: str, group: int) -> bytes:
    """The images of a row group: for each, where it begins, and the end of the last; then they themselves.

    Offsets are from the beginning, little-endian, of OFFSET_BYTES each.

    Raises:
        OSError: the file is gone or damaged, or has no column of images.
    """
    with _open(root, file) as source:
        if (name := image_column(source.schema_arrow)) is None:
            raise OSError(f"no column of images; it has {', '.join(source.schema_arrow.names)}")
        is_struct = pa.types.is_struct(source.schema_arrow.field(name).type)
        table = source.read_row_group(group, columns=[f"{name}.bytes" if is_struct else name], use_threads=False)
        chunks = [chunk.field("bytes") if is_struct else chunk for chunk in table.column(name).chunks]
        images = pa.concat_arrays([pa.array([], pa.large_binary()), *(c.cast(pa.large_binary()) for c in chunks)])
    _, offsets, data = images.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[images.offset : images.offset + len(images) + 1]
    content = memoryview(data)[ends[0] : ends[-1]] if data else b""
    return b"".join([(ends - ends[0] + ends.nbytes).astype("<i8").tobytes(), content])


@contextmanager
def _open(root: Storage, file: str) -> Iterator[parquet.ParquetFile]:
    try:
        with root.open(file) as f, parquet.ParquetFile(f) as source:
            yield source
    except pa.ArrowException as e:
        raise DamagedError(f"cannot be read as Parquet: {e}") from e


class LruCache:
    """The contents used last, of all together at most `max_bytes`, or a single larger one; for several threads."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._contents = max_bytes, OrderedDict[object, bytes]()
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def get(self, key: object, read: Callable[[], bytes]) -> bytes:
        """The content of this key, which `read` gets if it is not here; others wait for it meanwhile."""
        if (content := self._get(key)) is not None:
            return content
        with self._reading:
            if (content := self._get(key)) is None:
                content = read()
                with self._lock:
                    self._contents[key] = content
                    while len(self._contents) > 1 and sum(map(len, self._contents.values())) > self._max_bytes:
                        self._contents.popitem(last=False)
        return content

    def _get(self, key: object) -> bytes | None:
        with self._lock:
            if key in self._contents:
                self._contents.move_to_end(key)
            return self._contents.get(key)
