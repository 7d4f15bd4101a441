"""Finding what a source of images holds, and cutting the work on it into units.

Sources, recognised by what is in them:
    SRC/CLASS/.../image.jpg       the class is the first folder
    SRC/.../shard.tar             WebDataset, see `shards`
    SRC/.../file.parquet          encoded images as Hugging Face has them, see `parquet`
or one shard or Parquet file, or several by a pattern: s3://BUCKET/train-{000..146}.tar. SRC is a path or a URI.
"""

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from braceexpand import braceexpand

from pipeline.config.fields import refuse_credentials
from pipeline.data.index import refuse_archive
from pipeline.data.indexing.rows import SUFFIXES
from pipeline.errors import UserError
from pipeline.storage import Storage

UNIT_IMAGES = 1000
MAX_SHARDS = 100_000  # of a pattern; more is a slip of the pen, whose names alone would fill the memory
Kind = Literal["images", "tar", "parquet"]
KIND_NAMES: dict[Kind, str] = {"images": "images in class folders", "tar": "tar shards", "parquet": "Parquet files"}


@dataclass(frozen=True)
class Unit:
    """A piece of work: some files of one kind, relative to the root, a path or a URI."""

    root: str
    kind: Kind
    files: tuple[str, ...]
    sizes: tuple[int, ...] = ()  # of the files, bytes, where a listing has told them


@dataclass(frozen=True)
class Source:
    """A source's kind, its work in the order of the index, and its class folders, where there are such."""

    root: Storage
    kind: Kind
    units: list[Unit]
    folders: list[str]


SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # of a data set; never its classes


def kind_of(file: str) -> Kind | None:
    """What a file is, by its name."""
    suffix = posixpath.splitext(file)[1].lower()
    if suffix in SUFFIXES:
        return "images"
    if suffix == ".parquet":
        return "parquet"
    return "tar" if suffix in (".tar", ".tgz") or ".tar." in posixpath.basename(file) else None


def is_index(source: str) -> bool:
    """Whether a source is an index rather than what one is made of."""
    storage = Storage(source)
    if "{" in source or (kind_of(storage.name) and not (storage.local and storage.local.is_dir())):
        return False
    return not storage.local.is_dir() if storage.local else storage.name.endswith(".arrow")


def find_source(source: str) -> Source:
    """What is in a source.

    Raises:
        UserError: nothing, or several kinds, or no such place.
    """
    if not source.strip():
        raise UserError("the source of images is an empty text; give a folder, a file, a pattern or a URI")
    storage = Storage(source)
    refuse_credentials("the images' URI", source)
    if not storage.local and not urlsplit(source).netloc:
        raise UserError(f"{source} names no bucket or server; write it as s3://BUCKET/PATH")
    sizes: dict[str, int] = {}
    folders: list[str] = []
    try:
        if kind_of(storage.name) in ("tar", "parquet") and not (storage.local and storage.local.is_dir()):
            storage.parent.check()
            root, files = storage.parent, _expand(source, storage)
        else:
            root = storage
            files, folders, sizes = _list(storage)
    except ValueError as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{source}: {str(e).splitlines()[0]}; use a path, s3://..., gs://... or http(s)://") from None
    except OSError as e:
        raise UserError(f"{source} cannot be listed ({e})") from None
    by_kind: dict[Kind, list[str]] = {kind: [] for kind in get_args(Kind)}
    for file in files:
        kind = kind_of(file)
        if kind and (kind != "images" or "/" in file):  # an image in no folder has no class
            by_kind[kind].append(file)
    kinds = [kind for kind, some in by_kind.items() if some]
    if len(kinds) > 1:
        listed = " and ".join(f"{KIND_NAMES[kind]} ({by_kind[kind][0]})" for kind in kinds)
        raise UserError(f"{source} has {listed}; give one kind alone, such as DIR/train-{{000..146}}.tar")
    if not kinds:
        if not folders and (loose := [file for file in files if kind_of(file) == "images"]):
            fix = (
                f"put the images of each class into a folder of their own, such as {source.rstrip('/')}/cat/{loose[0]}"
            )
            raise UserError(f"{source} has {len(loose)} images, but no class folders; {fix}")
        lacks = "no usable image in its folders" if folders else "no class folders, no tar shards and no Parquet files"
        raise UserError(f"{source} has {lacks}; expected {source}/CLASS/image.jpg")
    if kinds == ["images"] and len(folders) > 1 and set(folders) <= SPLITS:
        each = " and ".join(f"{source.rstrip('/')}/{name}" for name in folders)
        raise UserError(f"{source} has the folders {', '.join(folders)}, which are no classes; give {each} instead")
    kind, step = kinds[0], UNIT_IMAGES if kinds[0] == "images" else 1
    cut = [by_kind[kind][k : k + step] for k in range(0, len(by_kind[kind]), step)]
    units = [Unit(root.uri, kind, tuple(some), tuple(sizes[f] for f in some if f in sizes)) for some in cut]
    return Source(root, kind, units, folders if kind == "images" else [])


def _expand(source: str, storage: Storage) -> list[str]:
    """The files that a pattern names."""
    if "{" in storage.parent.uri:
        raise UserError(f"{source}: braces may be in the files' names alone, as in DIR/train-{{000..146}}.tar")
    for first, last in re.findall(r"\{(\d+)\.\.(\d+)", storage.name):
        if len(first + last) > 18 or abs(int(last) - int(first)) > MAX_SHARDS:
            raise UserError(
                f"{source}: stands for more than {MAX_SHARDS} files; write it as DIR/train-{{000..146}}.tar"
            )
    try:
        files = list(dict.fromkeys(braceexpand(storage.name)))
    except ValueError as e:
        raise UserError(f"{source}: {e}; write it as DIR/train-{{000..146}}.tar") from None
    for file in files if storage.local else []:
        if not (path := storage.parent.local / file).is_file():  # type: ignore[operator]
            fault = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {fault}; give a folder, a file, or several as DIR/train-{{000..146}}.tar")
    return files


def _list(root: Storage) -> tuple[list[str], list[str], dict[str, int]]:
    """A folder's files, but hidden ones, in torchvision's order; its folders; and the files' sizes, if remote."""
    by_folder: dict[str, Iterable[str]] = {}
    sizes: dict[str, int] = {}
    if not root.local:
        sizes = {file: size for file, size in root.walk() if kind_of(file) and f"/{file}".count("/.") == 0}
        remote = defaultdict[str, list[str]](list)
        for file in sizes:
            remote[file.partition("/")[0] if "/" in file else ""].append(file)
        by_folder |= remote
    elif root.local.is_dir():
        entries = [entry for entry in root.local.iterdir() if not entry.name.startswith(".")]
        by_folder[""] = [entry.name for entry in entries if not entry.is_dir()]  # also links that lead nowhere
        by_folder |= {entry.name: _below(root.local, entry.name) for entry in entries if entry.is_dir()}
    else:
        refuse_archive(root.local)
        raise UserError(f"no folder {root}; expected {root}/CLASS/image.jpg")
    files = [file for _, some in sorted(by_folder.items()) for file in sorted(some, key=posixpath.split)]
    return files, sorted(name for name in by_folder if name), sizes


def images_at(path: Path) -> list[Path]:
    """The image files in a folder of this machine, at any depth, by their names, in torchvision's order; else `path`.

    Raises:
        UserError: a folder without any, or that cannot be listed.
    """
    try:
        is_folder = path.is_dir()
    except OSError:  # such as a name that is too long, which is told where it is read
        is_folder = False
    if not is_folder:
        return [path]
    try:
        files = [file for file in _below(path, "") if kind_of(file) == "images"]
    except OSError as e:
        raise UserError(f"{path} cannot be listed ({e.strerror})") from None
    if not files:
        raise UserError(f"{path} has no image file at any depth; their names end in {', '.join(sorted(SUFFIXES))}")
    return [path / file for file in sorted(files, key=posixpath.split)]


def _below(root: Path, folder: str) -> Iterator[str]:
    """Files at any depth, through links to folders, but no folder twice: a link may lead to its own parent."""
    seen: set[str] = set()

    def fail(e: OSError) -> None:
        raise e

    for parent, folders, names in os.walk(root / folder, followlinks=True, onerror=fail):
        seen.add(os.path.realpath(parent))
        visible = sorted(f for f in folders if not f.startswith("."))
        folders[:] = [f for f in visible if os.path.realpath(Path(parent, f)) not in seen]
        below = Path(parent).relative_to(root).as_posix()
        yield from (f"{below}/{name}" for name in names if kind_of(name) and not name.startswith("."))
