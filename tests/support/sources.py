"""The same images as a folder, tar shard and Parquet file, with their index; what reading tests begin with."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from pipeline.data.index import FORMAT, SCHEMA, Index
from pipeline.storage import Storage

CHUNK = 64 * 1024
NUM_IMAGES = 30
Row = tuple[str, str, int, int]  # file, name, offset, size


def image(k: int) -> bytes:
    """Reading does not look into it."""
    draw = random.Random(k)
    return draw.randbytes(draw.randint(1, 40_000))


IMAGES = [image(k) for k in range(NUM_IMAGES)]


def index_of(root: Storage, rows: list[Row], fingerprint: str = "f") -> Index:
    files, names, offsets, sizes = zip(*rows, strict=True)
    zeros = [0] * len(rows)
    meta = {"pipeline.index": str(FORMAT), "root": str(root), "classes": json.dumps(["a"]), "fingerprint": fingerprint}
    columns = [pa.array(files).dictionary_encode(), names, offsets, sizes, zeros, zeros, zeros]
    arrays = [pa.array(c).cast(t) for c, t in zip(columns, SCHEMA.types, strict=True)]
    return Index(pa.table(arrays, schema=SCHEMA.with_metadata(meta)))


def write_folder(root: Path) -> list[Row]:
    (root / "a b").mkdir(parents=True)
    for k, data in enumerate(IMAGES):
        (root / "a b" / f"{k}.jpg").write_bytes(data)
    return [(f"a b/{k}.jpg", "", 0, len(data)) for k, data in enumerate(IMAGES)]


def write_tar(root: Path) -> list[Row]:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "x.tar", "w") as tar:
        for k, data in enumerate(IMAGES):
            member = tarfile.TarInfo(f"{k}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(root / "x.tar") as tar:
        return [("x.tar", m.name, m.offset_data, m.size) for m in tar]


def write_parquet(root: Path, **columns: pa.Array) -> list[Row]:
    """Columns in row groups of 7, the last shorter."""
    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), root / "x.parquet", row_group_size=7)
    return [("x.parquet", "", k, len(data)) for k, data in enumerate(IMAGES)]


def write_hugging_face(root: Path) -> list[Row]:
    column = pa.array([{"bytes": data, "path": f"{k}.jpg"} for k, data in enumerate(IMAGES)])
    rows = write_parquet(root, label=pa.array(range(NUM_IMAGES)), photo=column)
    features = {"label": {"_type": "Value"}, "photo": {"_type": "Image"}}
    table = parquet.read_table(root / "x.parquet")
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, root / "x.parquet", row_group_size=7)
    return rows


WRITERS: dict[str, Callable[[Path], list[Row]]] = {
    "folder": write_folder,
    "tar": write_tar,
    "hugging_face": write_hugging_face,
    "parquet": lambda root: write_parquet(root, img=pa.array(IMAGES)),
}
