"""The table of samples: one row an image, in an Arrow file that is memory-mapped, never loaded whole.

Building it reads each image's header, so that crops can be drawn before anything is decoded, and
refuses by name what cannot be trained on. The rest of the program knows rows alone, not folders.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from pipeline.config import ConfigError

FORMAT = 1
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
# What PIL calls the formats that DALI decodes; a file is judged by its content, not by its suffix.
DECODABLE = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"}
SCHEMA = pa.schema(
    {
        "path": pa.large_string(),  # relative to the root
        "offset": pa.int64(),  # of the image's bytes in that file
        "size": pa.int64(),  # bytes
        "label": pa.int32(),
        "height": pa.int32(),  # pixels, EXIF orientation applied, as DALI does
        "width": pa.int32(),
    }
)
EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSED = (5, 6, 7, 8)  # values that swap height and width
TAIL_BYTES = 4096


@dataclass(frozen=True)
class Refused:
    """An input that is left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Index:
    """The samples of one data set; columns are views of the mapped file."""

    def __init__(self, table: pa.Table):
        meta = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        self.root = Path(meta["root"])
        self.classes: tuple[str, ...] = tuple(json.loads(meta["classes"]))
        self.fingerprint = meta["fingerprint"]
        self._table = table
        columns = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
        self._paths = columns["path"]
        self._offsets, self._sizes = columns["offset"].to_numpy(), columns["size"].to_numpy()
        self.labels, self.heights, self.widths = (columns[n].to_numpy() for n in ("label", "height", "width"))

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> str:
        return str(self._paths[row].as_py())

    def read(self, row: int) -> bytes:
        """The encoded image of one row.

        Raises:
            OSError: the file is gone or shorter than the index says.
        """
        with (self.root / self.path(row)).open("rb") as f:
            f.seek(self._offsets[row])
            data = f.read(self._sizes[row])
        if len(data) != self._sizes[row]:
            raise OSError(f"{self.root / self.path(row)}: {len(data)} bytes where the index has {self._sizes[row]}")
        return data

    def with_classes(self, classes: tuple[str, ...]) -> "Index":
        """The same samples, labelled by their place in `classes`.

        Raises:
            ConfigError: a class that is not among them.
        """
        if unknown := sorted(set(self.classes) - set(classes)):
            raise ConfigError(
                f"{self.root} has class {unknown[0]!r}, which the training images do not have; "
                f"rename or remove it (theirs: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})"
            )
        place = np.array([classes.index(c) for c in self.classes], dtype=np.int32)
        other = Index(self._table)
        other.labels, other.classes = place[self.labels], classes
        return other

    def save(self, path: Path) -> None:
        """Write the index; a reader sees the old file or the new one, never half of it.

        Raises:
            ConfigError: the place cannot be written to.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, self._table.schema) as writer:
                writer.write_table(self._table.combine_chunks())
            temporary.replace(path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise ConfigError(f"the index cannot be written to {path}: {e.strerror or e}; name another file") from None


def load_index(path: Path) -> Index:
    """Map an index file.

    Raises:
        ConfigError: not an index, or of another format version.
    """
    if not path.is_file():
        raise ConfigError(f"no folder or index file {path}")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        version = (table.schema.metadata or {}).get(b"pipeline.index")
    except (pa.ArrowInvalid, OSError) as e:
        raise ConfigError(
            f"{path} is not an index file ({e}); make one with: pipeline index FOLDER --out FILE"
        ) from None
    if version != str(FORMAT).encode() or not table.schema.equals(SCHEMA):
        raise ConfigError(
            f"{path} is not an index of format {FORMAT}; make it anew: pipeline index FOLDER --out {path}"
        )
    return Index(table)


def build_index(
    source: Path, *, num_threads: int = 8, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Index, list[Refused]]:
    """Index a folder of `class/.../image` files, in the order of class and path.

    Args:
        source: the folder; its subfolders are the classes, searched to any depth.
        progress: called with (files done, files in all).

    Returns:
        The index, and what was left out with reasons.

    Raises:
        ConfigError: no folder, no class folder, or no usable image.
    """
    if not source.is_dir():
        raise ConfigError(f"no folder {source}; expected {source}/CLASS/image.jpg")
    found = [(d.name, sorted(_images_below(d))) for d in sorted(p for p in source.iterdir() if p.is_dir())]
    found = [(name, files) for name, files in found if not name.startswith(".")]
    if not found:
        raise ConfigError(f"{source} has no class folders; expected {source}/CLASS/image.jpg")
    files = [f for _, class_files in found for f in class_files]
    refused: list[Refused] = []
    headers: dict[Path, tuple[int, int, int]] = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for done, (file, header) in enumerate(zip(files, pool.map(read_header, files), strict=True), 1):
            if isinstance(header, Refused):
                refused.append(header)
            else:
                headers[file] = header
            progress(done, len(files))
    kept = [(name, [f for f in class_files if f in headers]) for name, class_files in found]
    refused += [
        Refused(str(source / name), "a class without a usable image") for name, class_files in kept if not class_files
    ]
    kept = [(name, class_files) for name, class_files in kept if class_files]
    if not kept:
        raise ConfigError(f"{source} has no usable image; first of {len(refused)} refused: {refused[0]}")
    rows = [
        (f.relative_to(source).as_posix(), 0, size, label, height, width)
        for label, (_, class_files) in enumerate(kept)
        for f in class_files
        for size, height, width in [headers[f]]
    ]
    return Index(_table(rows, source.absolute(), [name for name, _ in kept])), refused


def index_files(paths: list[Path]) -> tuple[Index | None, list[Refused]]:
    """Index single image files, without labels; None where none is usable. Paths stay as given."""
    headers = [(path, read_header(path)) for path in dict.fromkeys(paths)]
    refused = [h for _, h in headers if isinstance(h, Refused)]
    rows = [(str(path), 0, h[0], 0, h[1], h[2]) for path, h in headers if not isinstance(h, Refused)]
    return (Index(_table(rows, Path(), ["unlabelled"])) if rows else None), refused


def _images_below(folder: Path) -> Iterator[Path]:
    """Image files at any depth, through links to folders, but no folder twice: a link may lead to its own parent."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(f for f in folders if os.path.realpath(Path(parent) / f) not in seen)
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(parent) / name


def read_header(path: Path) -> tuple[int, int, int] | Refused:
    """(bytes, height, width) of an image file, or why it cannot be trained on. Reads no pixels of a sound file."""
    try:
        str(path).encode()
        if not path.is_file():
            return Refused(str(path), "not a file" if path.exists() else "no such file")
        with path.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            if size == 0:
                return Refused(str(path), "empty file")
            f.seek(max(0, size - TAIL_BYTES))
            tail = f.read()
            f.seek(0)
            with Image.open(f) as image:
                if image.format not in DECODABLE:
                    return Refused(
                        str(path), f"format {image.format} is not decoded by DALI; convert it to JPEG or PNG"
                    )
                width, height = image.size
                if image.getexif().get(EXIF_ORIENTATION) in EXIF_TRANSPOSED:
                    width, height = height, width
                if not _ends_well(image.format, tail):
                    image.load()  # raises where the file is cut off
    except UnicodeEncodeError:
        return Refused(repr(str(path)), "the name is not UTF-8; rename it")
    except UnidentifiedImageError:
        return Refused(str(path), "not an image in a known format")
    except Exception as e:  # PIL raises what its format plug-ins raise: OSError, SyntaxError, struct.error, ...
        return Refused(str(path), f"not a readable image ({e})")
    return size, height, width


def _ends_well(image_format: str | None, tail: bytes) -> bool:
    """Whether a file's last bytes hold its format's end marker; formats without one always do."""
    return {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image_format or "", b"") in tail


def _table(rows: list[tuple[str, int, int, int, int, int]], root: Path, classes: list[str]) -> pa.Table:
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)]
    digest = hashlib.sha256(json.dumps(classes).encode())
    for column in columns:  # not the root: the same images at another place are the same data
        for buffer in column.buffers():
            digest.update(buffer or b"")
    metadata = {
        "pipeline.index": str(FORMAT),
        "root": str(root),
        "classes": json.dumps(classes),
        "fingerprint": digest.hexdigest(),
    }
    return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
