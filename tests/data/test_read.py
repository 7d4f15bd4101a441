"""Reading rows: the same bytes from every source, wherever it lies; fetched once; errors that name the place."""

import errno
import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from commands import ENVIRON
from odd_images import encode, picture
from s3 import s3_storage
from sources import CHUNK, IMAGES, NUM_IMAGES, WRITERS, Row, index_of, write_parquet
from web import WebServer, web_server

from pipeline.config.data import DataConfig
from pipeline.data.index import Index
from pipeline.data.indexing.build import build_index
from pipeline.data.loading import read
from pipeline.data.loading.groups import LruCache
from pipeline.data.loading.read import Reader, StorageAwayError
from pipeline.storage import Storage

REMOTE = ["s3", "web"]


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    with s3_storage() as storage:
        yield storage


@pytest.fixture(params=["local", *REMOTE])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Storage]]:
    """Puts what is in the folder `data` there, and says where."""
    data = tmp_path / "data"
    with ExitStack() as stack:

        def put() -> Storage:
            if request.param == "local":
                return Storage(data)
            if request.param == "web":
                return stack.enter_context(web_server(data)).storage
            target: Storage = request.getfixturevalue("s3") / tmp_path.name
            for name, _ in Storage(data).walk():
                target.upload(data / name, name)
            return target

        yield put


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(train="-", val="-", cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def open_reader() -> Iterator[Callable[..., Reader]]:
    """Readers with small chunks; a warning fails the test where it gives none to take it."""
    with ExitStack() as stack:

        def start(
            index: Index, cfg: DataConfig, warn: Callable[[str], None] = pytest.fail, retry_timeout_s: float = 0
        ) -> Reader:
            reader = Reader(index, cfg, warn, retry_timeout_s=retry_timeout_s, chunk_bytes=CHUNK)
            stack.callback(reader.close)
            return reader

        yield start


@pytest.mark.parametrize("kind", WRITERS)
def test_every_row_of_every_source_from_everywhere(
    kind: str,
    place: Callable[[], Storage],
    config: DataConfig,
    open_reader: Callable[..., Reader],
    tmp_path: Path,
) -> None:
    """By several threads, in an order that jumps about, with and without having been fetched ahead."""
    rows = WRITERS[kind](tmp_path / "data")
    index = index_of(place(), rows)
    reader = open_reader(index, config)
    reader.prefetch(range(0, NUM_IMAGES, 2))
    order = random.Random(0).sample(range(NUM_IMAGES), NUM_IMAGES)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.read, order)) == [IMAGES[k] for k in order]


def served(tmp_path: Path, kind: str, slow_s: float = 0.0) -> tuple[list[Row], WebServer, ExitStack]:
    rows = WRITERS[kind](tmp_path / "data")
    stack = ExitStack()
    return rows, stack.enter_context(web_server(tmp_path / "data", slow_s=slow_s)), stack


def test_each_chunk_is_fetched_once_by_all_processes_of_a_node(tmp_path: Path, config: DataConfig) -> None:
    """3 processes read all rows at once, each in another order; the server counts."""
    rows, server, stack = served(tmp_path, "tar", slow_s=0.02)
    program = (
        "import random, sys; from sources import *; from pipeline.data.loading.read import *\n"
        "cfg = DataConfig(train='-', val='-', cache_dir=sys.argv[2])\n"
        "index = index_of(Storage(sys.argv[1]), write_tar(Path(sys.argv[4])))\n"
        "reader = Reader(index, cfg, sys.exit, chunk_bytes=CHUNK)\n"
        "order = random.Random(int(sys.argv[3])).sample(range(NUM_IMAGES), NUM_IMAGES)\n"
        "reader.prefetch(order)\n"
        "assert [reader.read(k) for k in order] == [IMAGES[k] for k in order]\n"
        "reader.close()\n"
    )
    with stack:
        head = [sys.executable, "-W", "error", "-c", program, str(server.storage), str(config.cache_dir)]
        processes = [
            subprocess.Popen(
                [*head, str(seed), str(tmp_path / f"copy{seed}")],
                cwd=Path(__file__).parent,
                env=ENVIRON,
            )
            for seed in range(3)
        ]
        assert [p.wait(60) for p in processes] == [0, 0, 0]
    size = (tmp_path / "data" / "x.tar").stat().st_size
    assert len(server.gets) == -(-size // CHUNK)
    assert set(server.gets.values()) == {1}
    assert len(rows) == NUM_IMAGES


def test_a_process_killed_in_mid_download_stops_nobody(
    tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    rows, server, stack = served(tmp_path, "tar", slow_s=0.3)
    program = (
        "import sys; from sources import *; from pipeline.data.loading.read import *\n"
        "cfg = DataConfig(train='-', val='-', cache_dir=sys.argv[2])\n"
        "reader = Reader(index_of(Storage(sys.argv[1]), write_tar(Path(sys.argv[3]))), cfg, chunk_bytes=CHUNK)\n"
        "reader.read(0)\n"
    )
    with stack:
        command = [sys.executable, "-c", program, str(server.storage), str(config.cache_dir), str(tmp_path / "copy")]
        process = subprocess.Popen(command, cwd=Path(__file__).parent, env=ENVIRON)
        while not server.gets:
            time.sleep(0.01)
        process.kill()
        process.wait()
        server.slow_s = 0
        reader = open_reader(index_of(server.storage, rows), config)
        assert [reader.read(k) for k in range(NUM_IMAGES)] == IMAGES
    assert server.gets["/x.tar", f"bytes=0-{CHUNK - 1}"] == 2


def test_what_was_fetched_ahead_is_not_fetched_again(
    tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    for kind in ("tar", "folder", "parquet"):
        rows, server, stack = served(tmp_path / kind, kind)
        with stack:
            reader = open_reader(index_of(server.storage, rows), config)
            for _ in range(3):
                reader.prefetch(range(NUM_IMAGES))
            deadline = time.monotonic() + 20
            while reader._in_flight:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            before = server.gets.copy()
            assert before
            assert [reader.read(k) for k in range(NUM_IMAGES)] == IMAGES
            assert server.gets == before, kind


def test_a_rebuilt_index_sees_the_new_bytes(
    tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    rows, server, stack = served(tmp_path, "folder")
    with stack:
        assert open_reader(index_of(server.storage, rows), config).read(3) == IMAGES[3]
        (tmp_path / "data" / "a b" / "3.jpg").write_bytes(b"new")
        rows[3] = ("a b/3.jpg", "", 0, 3)
        assert open_reader(index_of(server.storage, rows, "g"), config).read(3) == b"new"


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "backoff", lambda: itertools.repeat(0.1))


@pytest.mark.usefixtures("quick_pauses")
def test_a_server_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    rows, server, stack = served(tmp_path, "tar")
    told: list[str] = []
    with stack:
        reader = open_reader(index_of(server.storage, rows), config, told.append, retry_timeout_s=30)
        assert reader.read(0) == IMAGES[0]
    with ThreadPoolExecutor(4) as pool:
        reading = pool.map(reader.read, range(NUM_IMAGES))
        time.sleep(0.5)
        with web_server(tmp_path / "data", server.server_port):
            assert list(reading) == IMAGES
    assert told[1:] == [f"{server.storage} answers again"]
    assert f"{server.storage} does not answer, trying again for 30 s: " in told[0]


@pytest.mark.usefixtures("quick_pauses")
def test_answers_that_break_off_are_asked_for_again(
    tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    rows, server, stack = served(tmp_path, "tar")
    with stack:
        server.cuts = 3
        reader = open_reader(index_of(server.storage, rows), config, lambda _: None, retry_timeout_s=30)
        assert [reader.read(k) for k in range(NUM_IMAGES)] == IMAGES
        assert server.cuts == 0


def test_a_server_that_stays_away_is_an_error_that_names_the_place(
    tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    rows, server, stack = served(tmp_path, "tar")
    stack.close()
    reader = open_reader(index_of(server.storage, rows), config)
    reader.prefetch(range(NUM_IMAGES))
    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{server.server_port}/x\.tar#5\.jpg: .*Connect"):
        reader.read(5)


def test_close_does_not_wait_for_a_server_that_is_away(tmp_path: Path, config: DataConfig) -> None:
    rows, server, stack = served(tmp_path, "tar")
    stack.close()
    before = threading.active_count()
    reader = Reader(index_of(server.storage, rows), config, lambda _: None, retry_timeout_s=600)
    reader.prefetch(range(NUM_IMAGES))
    time.sleep(0.2)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 2
    assert threading.active_count() <= before + 1  # fsspec's own thread stays


def test_files_that_are_gone_or_short_are_errors_that_name_the_place(
    place: Callable[[], Storage], config: DataConfig, open_reader: Callable[..., Reader], tmp_path: Path
) -> None:
    """At once, however patient the reader is with a storage."""
    (tmp_path / "data" / "a b").mkdir(parents=True)
    (tmp_path / "data" / "a b" / "1.jpg").write_bytes(IMAGES[1])
    rows = [("a b/gone.jpg", "", 0, 5), ("a b/1.jpg", "", 0, len(IMAGES[1]) + 9), ("a b/1.jpg", "", 10**9, 5)]
    reader = open_reader(index_of(place(), rows), config, retry_timeout_s=600)
    with pytest.raises(FileNotFoundError, match=r"data/a b/gone\.jpg|/a b/gone\.jpg"):
        reader.read(0)
    with pytest.raises(OSError, match=rf"/a b/1\.jpg: {len(IMAGES[1])} bytes where the index has {len(IMAGES[1]) + 9}"):
        reader.read(1)
    with pytest.raises(OSError, match=r"/a b/1\.jpg: 0 bytes where the index has 5"):
        reader.read(2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in the only folder of a mount."""
    made = tmp_path / "mount" / "data"
    made.mkdir(parents=True)
    for i in range(2):
        (made / f"{i}.jpg").write_bytes(IMAGES[i])
    return made


def rows_of(folder: Path) -> Index:
    return index_of(Storage(folder), [(f"{i}.jpg", "", 0, len(IMAGES[i])) for i in range(2)])


ERRORS = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOTCONN, errno.EHOSTDOWN]


def test_what_lasts_is_told_ever_more_seldom(
    folder: Path, config: DataConfig, open_reader: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = [0.0], list[tuple[float, str]]()
    reader = open_reader(rows_of(folder), config, lambda text: told.append((clock[0], text)), retry_timeout_s=600)

    class Closed:
        is_set = staticmethod(lambda: False)

        @staticmethod
        def wait(seconds: float) -> None:
            clock[0] += seconds

    monkeypatch.setattr(read, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(reader, "_closed", Closed)
    shutil.rmtree(folder)
    with pytest.raises(StorageAwayError):
        reader.read(0)
    assert [at for at, _ in told] == [0, 18, 38, 78, 158, 318]


@pytest.mark.usefixtures("quick_pauses")
@pytest.mark.parametrize("code", ERRORS)
def test_a_disk_or_mount_that_fails_is_waited_for_and_says_nothing_of_an_image(
    code: int, folder: Path, config: DataConfig, open_reader: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = itertools.chain([True, True, False], itertools.repeat(True))  # there again once, and then away for good
    really = os.preadv

    def fail(*args: Any) -> int:
        if next(fails):
            raise OSError(code, os.strerror(code))
        return really(*args)

    monkeypatch.setattr(os, "preadv", fail)
    told: list[str] = []
    reader = open_reader(rows_of(folder), config, told.append, retry_timeout_s=0.5)
    assert reader.read(0) == IMAGES[0]
    with pytest.raises(StorageAwayError, match=rf"1\.jpg: .*{os.strerror(code)}"):
        reader.read(1)
    assert told[1:] == [f"{folder} answers again"]
    assert re.search(rf"^{folder} does not answer, .*{os.strerror(code)}: '{folder}/.*jpg'$", told[0])


@pytest.mark.usefixtures("quick_pauses")
@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_mount_that_has_gone_is_waited_for(
    leaves: str, folder: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    told: list[str] = []
    reader = open_reader(rows_of(folder), config, told.append, retry_timeout_s=30)
    away = folder.rename(folder.parent.with_name("elsewhere"))
    if leaves == "an empty folder":
        folder.mkdir()

    def come_back() -> None:
        wait_for(told)
        if folder.exists():
            folder.rmdir()
        away.rename(folder)

    thread = threading.Thread(target=come_back)
    thread.start()
    assert reader.read(0) == IMAGES[0]
    thread.join()


def wait_for(told: list[str]) -> None:
    while not told:
        time.sleep(0.01)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_what_is_no_regular_file_is_read_by_nobody(
    kind: str, tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    """Opening a pipe waits for somebody who writes into it; a device may have no end."""
    (tmp_path / "a").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "a" / name).write_bytes(encode(picture(), "JPEG"))
    reader = open_reader(build_index(tmp_path)[0], config, retry_timeout_s=600)
    file = tmp_path / "a/0.jpg"
    file.unlink()
    with closing(socket.socket(socket.AF_UNIX)) as unix:
        match kind:
            case "pipe":
                os.mkfifo(file)
            case "socket":
                unix.bind(str(file))
            case "folder":
                file.mkdir()
            case "device":
                file.symlink_to("/dev/zero")
        with pytest.raises(OSError, match=r"0\.jpg: it is not a regular file"):
            reader.read(0)


@pytest.mark.parametrize("kind", [PermissionError, IsADirectoryError, NotADirectoryError])
def test_what_is_wrong_with_one_file_alone_is_that_image(
    kind: type[OSError],
    folder: Path,
    config: DataConfig,
    open_reader: Callable[..., Reader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, however patient the reader is."""

    def fail(path: Path, *_: Any) -> int:
        raise kind(1, "no", str(path))

    monkeypatch.setattr(read, "_read_local", fail)
    with pytest.raises(kind):
        open_reader(rows_of(folder), config, retry_timeout_s=600).read(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no Parquet file at all, is it", r"x\.parquet#row 0: cannot be read as Parquet"),
        (None, r"x\.parquet#row 0: no column of images; it has picture"),
    ],
)
def test_damaged_parquet_is_an_error_that_names_the_place(
    content: bytes | None, message: str, config: DataConfig, open_reader: Callable[..., Reader], tmp_path: Path
) -> None:
    rows = write_parquet(tmp_path / "data", picture=pa.array(IMAGES))
    if content:
        (tmp_path / "data" / "x.parquet").write_bytes(content)
    with pytest.raises(OSError, match=message):
        open_reader(index_of(Storage(tmp_path / "data"), rows), config).read(0)


def test_parquet_with_fewer_rows_and_without_an_image(
    config: DataConfig, open_reader: Callable[..., Reader], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data", image=pa.array([b"abc", None]))
    rows = [("x.parquet", "", 0, 3), ("x.parquet", "", 1, 3), ("x.parquet", "", 2, 3)]
    reader = open_reader(index_of(Storage(tmp_path / "data"), rows), config)
    assert reader.read(0) == b"abc"
    with pytest.raises(OSError, match=r"x\.parquet#row 1: 0 bytes where the index has 3"):
        reader.read(1)
    with pytest.raises(OSError, match=r"x\.parquet#row 2: the file has 2 rows"):
        reader.read(2)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_full_shuffle_of_more_than_the_cache_holds_reads_just_the_images(
    kind: str,
    tmp_path: Path,
    config: DataConfig,
    open_reader: Callable[..., Reader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each image would cost a chunk. Row groups, the least that can be read, stay in memory up to a bound."""
    monkeypatch.setattr(read, "GROUP_BYTES", 3 * 7 * 20_000)
    rows, server, stack = served(tmp_path, kind)
    small = replace(config, cache_gb=1e-4)
    told: list[str] = []
    with stack:
        reader = open_reader(index_of(server.storage, rows), small, told.append)
        reader.prefetch(range(NUM_IMAGES))
        assert [reader.read(k) for k in range(NUM_IMAGES)] == IMAGES
    assert len(told) == 1
    assert "more than data.cache_gb=0.0001" in told[0]
    assert "data.shuffle_block makes that faster" in told[0]
    if kind == "tar":
        asked = sorted(tuple(map(int, part.removeprefix("bytes=").split("-"))) for _, part in server.gets)
        assert [last - first + 1 for first, last in asked] == [len(data) for data in IMAGES]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("kind", "shuffle_block"), [("tar", 8), ("parquet", 8), ("folder", None)])
def test_more_than_the_cache_holds_goes_through_it_where_that_is_of_use(
    kind: str, shuffle_block: int | None, tmp_path: Path, config: DataConfig, open_reader: Callable[..., Reader]
) -> None:
    rows, server, stack = served(tmp_path, kind)
    small = replace(config, cache_gb=2e-4, shuffle_block=shuffle_block)
    with stack:
        reader = open_reader(index_of(server.storage, rows), small)
        assert [reader.read(k) for k in range(NUM_IMAGES)] == IMAGES
    used = sum(f.stat().st_size for f in (tmp_path / "cache" / "chunks").rglob("*") if f.is_file())
    assert 0 < used <= 200_000


def test_row_groups_in_memory_are_read_once_and_bounded() -> None:
    recent, reads = LruCache(100), list[int]()

    def read_one(key: int) -> bytes:
        reads.append(key)
        time.sleep(0.01)
        return bytes([key]) * 40

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: recent.get(1, lambda: read_one(1)), range(8))) == {bytes([1]) * 40}
    assert reads == [1]
    for key in (2, 1, 3, 1, 2):  # of three, the one used least lately goes
        recent.get(key, partial(read_one, key))
    assert reads == [1, 2, 3, 2]
    assert len(recent.get(4, lambda: b"x" * 1000)) == 1000
    assert recent.get(4, pytest.fail) == b"x" * 1000
