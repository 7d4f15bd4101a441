"""From a source of images to its index: its units are looked into in parallel and put together, column by column."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.index import FORMAT, SCHEMA, Index, load_index
from pipeline.data.indexing.find import Source, find_source, is_index, kind_of
from pipeline.data.indexing.rows import Label, Row, printable, read_file_header
from pipeline.data.indexing.scan import read_part, scan, scan_into
from pipeline.errors import UserError
from pipeline.storage import Storage

MAX_NAMED = 20  # inputs left out that are named one by one
NUM_THREADS = 8  # without a pool of the caller's: more than cores, as they wait for files
CLASSES_FILE = "classes.txt"  # beside shards or Parquet files: a name a line, by number
Progress = Callable[[int, int, str], None]  # units done, units in all, in words what there is so far


@dataclass(frozen=True)
class SkippedInput:
    """An input that is left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class IndexReport:
    """What building an index has found.

    refused: what is left out. cmyk: rows that are converted to RGB; exif_rotated: that are turned upright, as
    their EXIF orientation says. reused, units: how many units were done before, of how many.
    """

    refused: list[SkippedInput] = field(default_factory=list)
    cmyk: list[int] = field(default_factory=list)
    exif_rotated: list[int] = field(default_factory=list)
    reused: int = 0
    units: int = 0

    def tell_refused(self, warn: Callable[[str], None]) -> None:
        """Tell what is left out, the first `MAX_NAMED` by name."""
        for image in self.refused[:MAX_NAMED]:
            warn(f"left out {image}")
        if len(self.refused) > MAX_NAMED:
            warn(f"left out {len(self.refused) - MAX_NAMED} more; pipeline index lists them all")


def open_index(source: str, *, progress: Progress = lambda done, total, text: None) -> tuple[Index, IndexReport]:
    """The index that `source` is, or that of the images there.

    Raises:
        UserError: none can be read or built.
    """
    if not is_index(source):
        return build_index(source, progress=progress)
    return fetch_index(source), IndexReport()


def fetch_index(source: str) -> Index:
    """The index file at a path or URI.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_index(Storage(source).fetch())
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no index file {source}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"the index {source} cannot be read: {str(e).splitlines()[0]}") from None


def build_index(
    source: str | Path,
    *,
    pool: Executor | None = None,
    parts: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> tuple[Index, IndexReport]:
    """Index a source, in an order that depends on its names alone.

    Args:
        pool: works on its units; by default threads.
        parts: a folder that keeps what is done, for the next try; the caller removes it. None: only in memory.

    Raises:
        UserError: nothing there, several kinds, no usable image, or storage that does not answer.
    """
    images = find_source(str(source))
    if parts:
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write to {parts} ({e.strerror}); name another file with --out") from None
    own = ThreadPoolExecutor(NUM_THREADS) if pool is None else None
    try:
        done = (own or pool).map(partial(scan_into, parts) if parts else scan, images.units)  # type: ignore[union-attr]
        return _collect(str(source), images, done, progress)
    finally:
        if own:
            own.shutdown(cancel_futures=True)


def _collect(source: str, images: Source, done: Iterator[Any], progress: Progress) -> tuple[Index, IndexReport]:
    kept: list[pa.Table] = []
    refused: list[SkippedInput] = []
    names: dict[str, str] = {}  # class names as JSON -> a file that declares them
    num_images = reused = 0
    for number, (unit, part) in enumerate(zip(images.units, done, strict=True), 1):
        table = part
        if isinstance(part, tuple):
            path, is_reused = part
            table, reused = read_part(path), reused + is_reused
        names.setdefault(table.schema.metadata[b"names"].decode(), unit.files[0])
        usable = pc.is_null(table["reason"])
        refused += _refused(images.root, table.filter(pc.invert(usable)))
        kept.append(table.filter(usable).drop_columns(["reason"]).replace_schema_metadata(None))
        num_images += len(kept[-1])
        before = f", {reused} of {len(images.units)} parts were there already" if reused else ""
        progress(number, len(images.units), f"{num_images} images, {len(refused)} left out{before}")
    rows = pa.concat_tables(kept).combine_chunks()
    labels, classes = _labels(images, rows, _class_names(images, names))
    if labels.null_count:
        unknown = pc.is_null(labels)
        refused += _refused(images.root, rows.filter(unknown), lambda r: f"label {_text(r)} is not among the classes")
        known = pc.invert(unknown)
        rows, labels = rows.filter(known).combine_chunks(), labels.filter(known)
    empty = sorted(set(images.folders) - set(classes))
    refused += [SkippedInput(f"{images.root}/{printable(name)}", "a class without a usable image") for name in empty]
    if not len(rows):
        first = f"; first of {len(refused)} refused: {refused[0]}" if refused else ""
        raise UserError(f"{source} has no usable image{first}")
    cmyk, exif_rotated = (
        np.flatnonzero(rows[n].combine_chunks().to_numpy(zero_copy_only=False)) for n in ("cmyk", "exif_rotated")
    )
    columns = {name: rows[name] for name in SCHEMA.names if name != "label"} | {"label": labels}
    del rows, kept
    index = make_index(columns, images.root.uri, classes)
    return index, IndexReport(refused, cmyk.tolist(), exif_rotated.tolist(), reused, len(images.units))


def _refused(
    root: Storage, rows: pa.Table, reason: Callable[[dict[str, Any]], str] | None = None
) -> list[SkippedInput]:
    skipped = []
    for row in rows.to_pylist():
        number = f"#row {row['offset']}" if kind_of(row["file"]) == "parquet" and row["offset"] >= 0 else ""
        part = f"#{row['name']}" if row["name"] else number
        skipped.append(SkippedInput(f"{root}/{row['file']}{part}", reason(row) if reason else row["reason"]))
    return skipped


def _text(row: dict[str, Any]) -> str:
    return repr(row["text"])[:60] if row["number"] is None else str(row["number"])


def _class_names(images: Source, declared: dict[str, str]) -> list[str] | None:
    """The classes by number, as classes.txt or else the files themselves declare them."""
    if images.kind == "images":
        return None
    try:
        text = images.root.read_bytes(CLASSES_FILE).decode()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{images.root}/{CLASSES_FILE} cannot be read ({e}); fix or remove it") from None
    if names := text.replace("\r\n", "\n").rstrip("\n"):
        return _distinct(names.split("\n"), f"{images.root}/{CLASSES_FILE}")
    declared = {names: file for names, file in declared.items() if names != "null"}
    if len(declared) > 1:
        first, second = list(declared.values())[:2]
        raise UserError(f"{images.root}: {first} and {second} declare different classes; index them apart")
    return next((_distinct(json.loads(names), f"{images.root}/{file}") for names, file in declared.items()), None)


def _distinct(names: list[str], file: str) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file} names the class {twice[0]!r} twice; give each a name of its own")
    return names


def _labels(images: Source, rows: pa.Table, names: list[str] | None) -> tuple[pa.Array, list[str]]:
    """int32 class numbers, null where a label is not among the classes; and the classes."""
    texts, numbers = rows["text"].combine_chunks(), rows["number"].combine_chunks()
    if names is None and texts.null_count == len(texts):
        highest = pc.max(numbers).as_py()
        return numbers, [str(k) for k in range(0 if highest is None else highest + 1)]
    if names is None:
        if texts.null_count:
            examples = (rows.filter(pc.is_valid(column)).slice(0, 1).to_pylist()[0] for column in (texts, numbers))
            listed = " and ".join(f"{_text(row)} ({row['file']} {row['name']})" for row in examples)
            raise UserError(
                f"{images.root} has both names and numbers for labels, such as {listed}; fix those that are wrong, "
                f"or give the names by number in {CLASSES_FILE} there, one a line"
            )
        names = sorted(pc.unique(texts).to_pylist())
    by_name = pc.index_in(texts, pa.array(names, pa.large_string()))
    by_number = pc.if_else(pc.less(numbers, len(names)), numbers, pa.scalar(None, pa.int32()))
    return pc.coalesce(by_name, by_number), names


def make_index(columns: dict[str, Any], root: str, classes: list[str]) -> Index:
    """The index of columns as in its schema, `file` being plain text."""
    arrays = []
    for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True):
        column = columns.pop(name)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        arrays.append(column.dictionary_encode() if name == "file" else column.cast(kind))
    metadata = {
        "pipeline.index": str(FORMAT),
        "root": root,
        "classes": json.dumps(classes),
        "fingerprint": _fingerprint(arrays, classes),
    }
    return Index(pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata)))


def drop_rows(index: Index, rows: list[int]) -> Index:
    """The index without some rows; its classes stay."""
    keep = np.ones(len(index), dtype=bool)
    keep[rows] = False
    table = index.table.filter(pa.array(keep))
    columns = {name: table[name] for name in SCHEMA.names}
    columns["file"] = columns["file"].cast(pa.large_string())
    return make_index(columns, index.root.uri if index.root else "", list(index.classes))


def _fingerprint(arrays: list[pa.Array], classes: list[str]) -> str:
    """Of classes and rows, not of the root: the same images at another place are the same data."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    file, *others = arrays
    for array in (file.indices, file.dictionary, *others):
        if not pa.types.is_large_string(array.type):
            digest.update(np.ascontiguousarray(array.to_numpy()).data)
        elif len(array):
            _, offsets, text = array.buffers()
            ends = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8)
            digest.update((ends - ends[0]).data)
            digest.update(memoryview(text or b"")[ends[0] : ends[-1]])
    return digest.hexdigest()


def index_files(paths: Sequence[Path]) -> tuple[Index | None, list[SkippedInput]]:
    """Index single image files, without labels; None where none is usable. Paths stay as given."""
    rows = [Row.of(str(p), "", 0, partial(Label, text=""), partial(read_file_header, p)) for p in dict.fromkeys(paths)]
    refused = [SkippedInput(row.file, row.reason) for row in rows if row.reason is not None]
    kept = [row for row in rows if row.reason is None]
    columns = {name: pa.array([getattr(row, name, 0) for row in kept]) for name in SCHEMA.names}
    for name in ("file", "name"):
        columns[name] = columns[name].cast(pa.large_string())
    return (make_index(columns, "", ["unlabelled"]) if kept else None), refused
