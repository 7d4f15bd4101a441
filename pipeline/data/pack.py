"""Packing images into WebDataset tar shards, which a disk or an object store reads in sequence.

The images lie in a shuffled order: sorted by class, a block-shuffled training would see few classes at a time.
The same images, seed and size of shards give the same bytes.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.index import Index
from pipeline.data.indexing.build import CLASSES_FILE, Progress
from pipeline.data.indexing.rows import DECODABLE
from pipeline.data.loading.read import Reader
from pipeline.data.stream import permute
from pipeline.errors import UserError
from pipeline.local_files import fsync

CHUNK = 256  # images in memory, twice
READ_THREADS = 8


def require_new(out: Path) -> None:
    """UserError where the folder exists."""
    if out.exists():
        raise UserError(f"{out} exists; name a new folder, or remove it")


def pack(
    index: Index, out: Path, *, shard_mb: float, seed: int, progress: Progress, warn: Callable[[str], None]
) -> list[str]:
    """Write all images of an index as OUT/NAME-000000.tar and so on, NAME being the folder's, and OUT/classes.txt.

    Args:
        out: a folder to be made; it is there when all is done, or not at all.
        shard_mb: size of a shard, 10^6 bytes, which only a single larger image exceeds.
        progress: called with (images done, images in all, words).
        warn: told what makes reading slow.

    Returns:
        The shards' names.

    Raises:
        UserError: the folder exists or cannot be written to, or an image is no longer what the index says.
    """
    require_new(out)
    if odd := [name for name in index.classes if name != name.strip("\r\n") or "\n" in name or not name]:
        raise UserError(f"the class name {odd[0]!r} does not fit on a line of {CLASSES_FILE}; rename the class")
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        (temporary / CLASSES_FILE).write_text("".join(f"{name}\n" for name in index.classes), encoding="utf-8")
        shards = _write(_samples(index, seed, warn), temporary, out.name, shard_mb * 1e6, len(index), progress)
        for file in (*temporary.iterdir(), temporary):
            fsync(file)
        temporary.rename(out)
        fsync(out.parent)
    except OSError as e:
        raise UserError(f"cannot pack {index} into {out}: {e}; fix that, or index the images anew") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shards


def _write(
    samples: Iterator[dict[str, bytes]], folder: Path, name: str, max_bytes: float, num: int, progress: Progress
) -> list[str]:
    shards: list[str] = []
    tar: tarfile.TarFile | None = None
    try:
        for number, sample in enumerate(samples):
            size = sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for data in sample.values())
            if tar is None or 0 < tar.offset > max_bytes - size - tarfile.RECORDSIZE:
                if tar:
                    tar.close()
                shards.append(f"{name}-{len(shards):06}.tar")
                tar = tarfile.open(folder / shards[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            for kind, data in sample.items():
                member = tarfile.TarInfo(f"{number:09}.{kind}")  # its other fields are the same everywhere
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            progress(number + 1, num, f"images, {len(shards)} shards")
    finally:
        if tar:
            tar.close()
    return shards


def _samples(index: Index, seed: int, warn: Callable[[str], None]) -> Iterator[dict[str, bytes]]:
    """Each image with its label, by the suffixes of a shard; read ahead."""
    chunks = list(pairwise([*range(0, len(index), CHUNK), len(index)]))
    with closing(Reader(index, DataConfig(), warn)) as reader, ThreadPoolExecutor(READ_THREADS) as pool:

        def begin(start: int, stop: int) -> tuple[list[int], Iterator[bytes]]:
            rows = permute(np.arange(start, stop), len(index), seed, 0).tolist()
            return rows, pool.map(reader.read, rows)

        following = begin(*chunks[0])
        for chunk in [*chunks[1:], None]:
            rows, images = following
            if chunk:
                following = begin(*chunk)
            for row, data in zip(rows, images, strict=True):
                yield _sample(index, row, data)


def _sample(index: Index, row: int, data: bytes) -> dict[str, bytes]:
    with Image.open(io.BytesIO(data)) as image:
        suffix = DECODABLE[image.format or ""]
    label = int(index.labels[row])
    about = {"label": label, "class": index.classes[label], "path": index.path(row)}
    return {suffix: data, "cls": str(label).encode(), "json": json.dumps(about).encode()}
