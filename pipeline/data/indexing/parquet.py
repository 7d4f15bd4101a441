"""The rows of a Parquet file with encoded images, as Hugging Face's data sets have them."""

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from pipeline.data.indexing.rows import Header, InvalidImage, Row, parse_label, read_header

WHOLE = -1  # in place of a row's number, for a file that is refused as a whole
BATCH_ROWS = 64  # of images in memory at once
IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels")


def image_column(schema: pa.Schema) -> str | None:
    """The column with the images: the first feature of type Image, else by its name."""
    return _column(schema, "Image", IMAGE_NAMES)


def read_rows(file: str, f: BinaryIO) -> tuple[list[Row], list[str] | None]:
    """The rows of a file, whose offsets are row numbers; and its class names, where it declares them.

    Args:
        file: its name in the index.
        f: the file, open.
    """
    try:
        source = parquet.ParquetFile(f)
    except pa.ArrowInvalid as e:
        return [Row.refused(file, f"not a Parquet file ({e})", offset=WHOLE)], None
    schema = source.schema_arrow
    image, label = image_column(schema), _column(schema, "ClassLabel", LABEL_NAMES)
    fault = _fault(schema, image, label)
    if image is None or label is None or fault:
        return [Row.refused(file, fault, offset=WHOLE)], None
    rows: list[Row] = []
    first = 0
    for group in range(source.num_row_groups):
        count = source.metadata.row_group(group).num_rows
        try:
            pairs = _pairs(source, group, image, label)
            rows += [_row(file, first + k, data, value) for k, (data, value) in enumerate(pairs)]
        except (pa.ArrowException, OSError) as e:
            _check_storage(f, source.metadata.row_group(group))
            rows.append(Row.refused(file, f"rows {first} to {first + count - 1} cannot be read ({e})", offset=first))
        first += count
    names = _features(schema).get(label, {}).get("names")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return rows, names if are_names else None


def _fault(schema: pa.Schema, image: str | None, label: str | None) -> str:
    """Why a file cannot be used; empty if it can."""
    if image is None or label is None:
        what, names = ("images", IMAGE_NAMES) if image is None else ("labels", LABEL_NAMES)
        return f"no column of {what}, named {' or '.join(names)}; it has {', '.join(schema.names)}"
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), kind)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return f"its column {image} holds {kind}, not the bytes of images"
    return ""


def _row(file: str, number: int, data: bytes | None, value: Any) -> Row:
    def header() -> Header:
        if data is None:
            raise InvalidImage("no image's bytes in it")
        return read_header(io.BytesIO(data))

    return Row.of(file, "", number, lambda: parse_label(value), header)


def _pairs(source: parquet.ParquetFile, group: int, image: str, label: str) -> Iterator[tuple[bytes | None, Any]]:
    for batch in source.iter_batches(BATCH_ROWS, row_groups=[group], columns=[image, label]):
        images = batch.column(image)
        if pa.types.is_struct(images.type):
            images = pc.struct_field(images, "bytes")
        for data, value in zip(images, batch.column(label), strict=True):
            yield data.as_py(), value.as_py()


def _check_storage(f: BinaryIO, group: Any) -> None:
    """OSError where it is not the file that is damaged, but the storage that does not answer."""
    for column in map(group.column, range(group.num_columns)):
        f.seek(column.data_page_offset)
        f.read(column.total_compressed_size)


def _column(schema: pa.Schema, feature: str, names: tuple[str, ...]) -> str | None:
    declared = (name for name, kind in _features(schema).items() if kind.get("_type") == feature)
    return next(declared, None) or next((name for name in names if name in schema.names), None)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The features that Hugging Face's metadata declare."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict) and name in schema.names}
    except (KeyError, TypeError, ValueError):
        return {}
