"""The rows of a WebDataset tar shard: images in place, each with the label that lies beside it.

A sample's key is a member's path up to the first dot of its base name; what follows is its kind: jpg, cls, json.
Whatever is wrong with a member, those before and after it are kept.
"""

import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from pipeline.data.indexing.rows import SUFFIXES, InvalidImage, Label, Row, is_class_number, parse_label, read_header

BLOCK = tarfile.BLOCKSIZE
MAGIC, MAGIC_AT = b"ustar", 257
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
MAX_LABEL_BYTES = 16 << 20
JSON_KEYS = ("label", "cls", "class")


class Member(NamedTuple):
    """A regular file in a shard, or what keeps it, or a stretch of the shard (no name), from use."""

    name: str
    offset: int
    size: int
    fault: str = ""


def read_rows(file: str, f: BinaryIO) -> list[Row]:
    """The rows of a shard in its order.

    Args:
        file: its name in the index.
        f: the shard, open.
    """
    rows: list[Row] = []
    images: dict[str, int] = {}  # key -> position in `rows`
    dotted: dict[str, str] = {}  # key -> name of an image such as a.5.jpg
    labels: dict[tuple[str, str], Label | InvalidImage] = {}  # by key and kind
    for name, offset, size, fault in _members(f):
        folder, base = posixpath.split(posixpath.normpath(name))
        stem, _, kind = base.partition(".")
        key, kind = posixpath.join(folder, stem), kind.lower()
        if not fault and key in images and f".{kind}" in SUFFIXES:
            fault = f"a second image of the key {key}"
        if fault:
            rows.append(Row.refused(file, fault, name, offset))
        elif not stem:
            continue  # hidden, such as ._x.jpg
        elif f".{kind}" in SUFFIXES:
            images[key] = len(rows)
            data = io.BytesIO(_read(f, offset, size))
            rows.append(Row.of(file, name, offset, Label, lambda data=data: read_header(data)))  # type: ignore[misc]
        elif kind in ("cls", "json"):
            if (label := _label(kind, _read(f, offset, min(size, MAX_LABEL_BYTES)))) is not None:
                labels.setdefault((key, kind), label)
        elif posixpath.splitext(base)[1].lower() in SUFFIXES:
            dotted.setdefault(key, name)
    for key, position in images.items():
        rows[position] = _labelled(rows[position], key, labels)
    for key, name in dotted.items():
        if key not in images:
            reason = f"its key ends at the first dot, so {key!r} has no image; rename it to have one dot"
            rows.append(Row.refused(file, reason, name))
    return rows


def _labelled(row: Row, key: str, labels: dict[tuple[str, str], Label | InvalidImage]) -> Row:
    """The row with the label of its key. The folder's name counts only in a shard that has no other labels."""
    label = labels.get((key, "cls")) or labels.get((key, "json"))
    if row.reason is not None:
        return row
    if label is None and not labels and (folder := posixpath.basename(posixpath.dirname(key))):
        label = Label(text=folder)
    if isinstance(label, Label):
        return row._replace(number=label.number, text=label.text)
    return Row.refused(row.file, str(label) if label else "no label", row.name, row.offset)


def _label(kind: str, data: bytes) -> Label | InvalidImage | None:
    """What a label file says; None where a JSON has no label in it."""
    try:
        text = data.decode().strip()
        if kind == "cls":
            return parse_label(int(text) if is_class_number(text) else text)
        content: Any = json.loads(text)
        values = [content[key] for key in JSON_KEYS if key in content] if isinstance(content, dict) else []
        return parse_label(values[0]) if values else None
    except InvalidImage as e:
        return e
    except (ValueError, RecursionError) as e:
        return InvalidImage(f"its .{kind} is not readable ({e})")


def _members(f: BinaryIO) -> Iterator[Member]:
    """All members but folders. Where a header is damaged, the next sound one is looked for."""
    end, offset = f.seek(0, os.SEEK_END), 0
    while True:
        for member in _run(f, offset):
            offset = member.offset + -(-member.size // BLOCK) * BLOCK
            if member.offset + member.size > end:
                num_bytes = max(0, end - member.offset)
                yield member._replace(fault=f"cut off: {num_bytes} of {member.size} bytes are there")
            elif member.name:
                yield member
        if offset > end:
            return  # told already
        block = _read(f, offset, BLOCK)
        if offset == 0 and block.startswith(COMPRESSED):
            yield Member("", 0, 0, "compressed, so that its images cannot be read in place; unpack it, as with gunzip")
            return
        header = _next_header(f, offset + 1)
        if len(block) < BLOCK:
            yield Member("", offset, 0, f"cut off: it ends at byte {offset} without the mark of a tar file's end")
        elif any(block):  # otherwise that mark; after it may come another tar file
            until = "its end" if header is None else f"byte {header}"
            yield Member("", offset, 0, f"not a tar file, or damaged, from byte {offset} to {until}; that is left out")
        if header is None:
            return
        offset = header


def _run(f: BinaryIO, offset: int) -> Iterator[Member]:
    """Members from `offset` up to the first place that is no header; folders without a name, but with their end."""
    f.seek(offset)
    try:
        tar = tarfile.open(fileobj=f, mode="r:")  # noqa: SIM115  closing it would not close f
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0:
                return
            # A hard link, or a sparse file, takes less room than its size, or another layout.
            size = member.size if member.isreg() and not member.issparse() else tar.offset - member.offset_data
            yield Member("" if member.isdir() else member.name, member.offset_data, size, _fault(member))
    except (tarfile.TarError, ValueError):
        return


def _fault(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its path is absolute or has '..' in it; pack it with a plain relative path"
    if member.issym() or member.islnk():
        return f"a link, to {member.linkname}; pack the file itself"
    if member.issparse():
        return "a sparse file, which cannot be read in place; pack it whole"
    return "" if member.isreg() or member.isdir() else "not a file"


def _next_header(f: BinaryIO, start: int) -> int | None:
    """Where the first sound header at or after `start` lies."""
    f.seek(start)
    at, data = start, b""
    while more := f.read(1 << 20):
        data += more
        magic = data.find(MAGIC)
        while magic >= 0 and magic - MAGIC_AT + BLOCK <= len(data):
            header = magic - MAGIC_AT
            if header >= 0 and _is_header(data[header : header + BLOCK]):
                return at + header
            magic = data.find(MAGIC, magic + 1)
        at, data = at + max(0, len(data) - BLOCK), data[-BLOCK:]
    return None


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
    except tarfile.HeaderError:
        return False


def _read(f: BinaryIO, offset: int, size: int) -> bytes:
    f.seek(offset)
    return f.read(size)
