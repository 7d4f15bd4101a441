"""The table of samples: one row an image, in an Arrow file that is memory-mapped, never loaded whole.

The rest of the program knows rows alone, not folders, tar shards or Parquet files.
"""

import json
import os
import weakref
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.storage import Storage

FORMAT = 2
SCHEMA = pa.schema(
    {
        "file": pa.dictionary(pa.int32(), pa.large_string()),  # relative to the root: an image, a shard, a Parquet file
        "name": pa.large_string(),  # of the member of a shard; empty elsewhere
        "offset": pa.int64(),  # of the image's bytes in the file; of a Parquet file: the row
        "size": pa.int64(),  # bytes of the encoded image
        "label": pa.int32(),
        "height": pa.int32(),  # pixels, EXIF orientation applied, as DALI does
        "width": pa.int32(),
    }
)


class OpenFile:
    """A descriptor of this process, which is closed with its last user."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open file cannot be sent to another process by its number")

    @property
    def path(self) -> str:
        """By which this process opens it once more, whatever lies at its own path by now."""
        return f"/proc/self/fd/{self.descriptor}"


class Index:
    """The samples of one data set; columns are views of the mapped file.

    root: the folder, of this machine or of an object store, that file names are relative to; None for names that
    stand for themselves.

    Args:
        file: that the table is mapped from; None for a table in memory.

    Attributes:
        in_memory: it was made here, and stands in no file.
    """

    def __init__(self, table: pa.Table, file: OpenFile | None = None):
        self._file, self.in_memory = file, file is None
        meta = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        self.root = Storage(meta["root"]) if meta["root"] else None
        self.classes: tuple[str, ...] = tuple(json.loads(meta["classes"]))
        self.fingerprint = meta["fingerprint"]
        self.table = table
        columns = {name: _join_chunks(table.column(name)) for name in SCHEMA.names}
        self._files, self._names = columns["file"], columns["name"]
        self.offsets, self.sizes, self.labels, self.heights, self.widths = (
            columns[n].to_numpy() for n in ("offset", "size", "label", "height", "width")
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return str(self.root or "the given images")

    def file(self, row: int) -> str:
        """The file that holds a row's image, relative to the root."""
        return str(self._files[row].as_py())

    def image_sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B, 2) of images as (height, width), pixels."""
        return np.stack([self.heights[rows], self.widths[rows]], axis=1).astype(np.int64)

    def labels_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) places in `classes`."""
        labels: NDArray[np.int64] = self.labels[rows].astype(np.int64)
        return labels

    def path(self, row: int) -> str:
        """A row's image for people: its file, and which part of it where it holds several."""
        file, name = self.file(row), self._names[row].as_py()
        if file.endswith(".parquet"):
            return f"{file}#row {self.offsets[row]}"
        return f"{file}#{name}" if name else file

    def full_path(self, row: int) -> str:
        """The same with the root before it."""
        return f"{self.root}/{self.path(row)}" if self.root else self.path(row)

    def with_classes(self, classes: tuple[str, ...]) -> "Index":
        """The same samples, labelled by their place in `classes`.

        Raises:
            UserError: a class that is not among them.
        """
        if classes == self.classes:
            return self
        if unknown := sorted(set(self.classes) - set(classes)):
            raise UserError(
                f"{self} has class {unknown[0]!r}, which the training images do not have; "
                f"rename or remove it (theirs: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})"
            )
        number = {name: k for k, name in enumerate(classes)}
        new_labels = np.array([number[c] for c in self.classes], dtype=np.int32)
        relabelled = Index(self.table, self._file)
        relabelled.labels, relabelled.classes = new_labels[self.labels], classes
        return relabelled

    def shared_file(self) -> int:
        """A descriptor of the index's file, for another process: it has this table, whatever becomes of the path.

        A table in memory goes into a file in memory.
        """
        if self._file is None:
            table = self.table.combine_chunks()
            self._file = OpenFile(os.memfd_create("index"))
            with pa.OSFile(self._file.path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return self._file.descriptor

    def save(self, path: Path) -> None:
        """Write the index.

        Raises:
            UserError: the place cannot be written to.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(self.table.combine_chunks(), path)
        except OSError as e:
            raise UserError(f"the index cannot be written to {path}: {e.strerror or e}; name another file") from None


def write_table(table: pa.Table, path: Path) -> None:
    """Write an Arrow file; a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _join_chunks(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece; `combine_chunks` would copy a single one, too."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")


def refuse_archive(path: Path) -> None:
    """Raise UserError where a source is a packed folder."""
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise UserError(f"{path} is an archive, which is not read in place; unpack it, and give its folder")


def load_index(path: Path) -> Index:
    """Map an index file.

    Raises:
        UserError: not an index, or of another format version. OSError: it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"no folder or index file {path}")
    file = OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        table = map_table(file)
        version = (table.schema.metadata or {}).get(b"pipeline.index")
    except (pa.ArrowInvalid, OSError) as e:
        if getattr(e, "errno", None):  # the file system's; what pyarrow has against the content has none
            raise
        refuse_archive(path)
        raise UserError(f"{path} is not an index file ({e}); make one with: pipeline index FOLDER --out FILE") from None
    if version != str(FORMAT).encode() or not table.schema.equals(SCHEMA):
        raise UserError(f"{path} is not an index of format {FORMAT}; make it anew: pipeline index FOLDER --out {path}")
    return Index(table, file)


def map_table(file: OpenFile) -> pa.Table:
    """The table in an open file."""
    return pa.ipc.open_file(pa.memory_map(file.path)).read_all()
