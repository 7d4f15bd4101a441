"""The cache of remote chunks: right bytes, one fetch, a bound; also with several processes, and killed ones."""

import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from commands import ENVIRON

from pipeline.data.loading.cache import HEADER_BYTES, DiskCache

SIZE = 64 * 1024


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def no_report(text: str) -> None:
    raise AssertionError(text)


def no_fetch() -> bytes:
    raise AssertionError("fetched again")


def stored(folder: Path) -> int:
    """Bytes of all that is in the cache."""
    return sum(f.stat().st_size for kind in ("chunks", "parts") for f in (folder / kind).rglob("*") if f.is_file())


def chunk_file(folder: Path) -> Path:
    (file,) = (f for f in (folder / "chunks").rglob("*") if f.is_file())
    return file


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process of its own, whose program has the names of this file."""
    with ExitStack() as stack:

        def start_one(program: str, *args: object) -> "subprocess.Popen[str]":
            head = "import os, random, sys, time; from pathlib import Path; from test_cache import *\n"
            command = [sys.executable, "-c", head + program, *map(str, args)]
            process = subprocess.Popen(
                command,
                cwd=Path(__file__).parent,
                env=ENVIRON,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start_one


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path, 100 * SIZE, no_report)


def test_any_part_is_read_and_a_chunk_is_fetched_once(cache: DiskCache) -> None:
    whole = content(1)
    assert cache.read(0, SIZE, lambda: whole, "uri", 1) == whole
    assert cache.read(5, 17, no_fetch, "uri", 1) == whole[5:17]
    assert cache.read(SIZE - 3, SIZE + 10, no_fetch, "uri", 1) == whole[-3:]  # the end of the file, not an error
    assert cache.read(SIZE + 1, SIZE + 2, no_fetch, "uri", 1) == b""
    assert cache.has("uri", 1)
    assert not cache.has("uri", 2)


def test_another_fingerprint_never_sees_old_bytes(cache: DiskCache) -> None:
    cache.read(0, SIZE, lambda: content(1), "uri", "old", 1)
    assert cache.read(0, SIZE, lambda: content(2), "uri", "new", 1) == content(2)


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:3], lambda b: b""])
def test_a_chunk_of_a_wrong_length_is_fetched_anew(
    cache: DiskCache, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    cache.read(0, 1, lambda: content(1), "k")
    chunk_file(tmp_path).write_bytes(harm(chunk_file(tmp_path).read_bytes()))
    assert cache.read(0, SIZE, lambda: content(1), "k") == content(1)
    assert cache.read(0, SIZE, no_fetch, "k") == content(1)


def test_the_oldest_in_use_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10 * (SIZE + HEADER_BYTES), no_report)
    for k in range(10):
        cache.read(0, 1, partial(content, k), k)
    cache.read(0, 1, no_fetch, 0)
    cache.read(0, 1, lambda: content(10), 10)
    assert [cache.has(k) for k in (0, 1, 9, 10)] == [True, False, True, True]


def test_the_bound_holds_under_several_processes(start: Start, tmp_path: Path) -> None:
    """4 processes read 150 chunks each, at random, of 40 of which 10 fit; no byte is wrong at any time."""
    limit = 10 * (SIZE + HEADER_BYTES)
    program = (
        "cache = DiskCache(Path(sys.argv[1]), int(sys.argv[2]), no_report); draw = random.Random(int(sys.argv[3]))\n"
        "for k in (draw.randrange(40) for _ in range(150)):\n"
        "    assert cache.read(100, 200, lambda: content(k), k) == content(k)[100:200]\n"
    )
    processes = [start(program, tmp_path, limit, seed) for seed in range(4)]
    most = 0
    while any(p.poll() is None for p in processes):
        if (tmp_path / "parts").exists():
            most = max(most, stored_now(tmp_path))
        time.sleep(0.005)
    assert [p.wait() for p in processes] == [0, 0, 0, 0]
    # A file that is renamed while the folders are listed may be counted twice.
    assert 5 * SIZE < most <= limit + 4 * (SIZE + HEADER_BYTES)
    assert stored(tmp_path) <= limit


def stored_now(folder: Path) -> int:
    """The same while files come and go."""
    while True:
        try:
            return stored(folder)
        except FileNotFoundError:
            continue


def test_processes_that_want_a_chunk_at_once_fetch_it_once(start: Start, tmp_path: Path) -> None:
    program = (
        "def fetch():\n"
        "    with open(sys.argv[1] + '/log', 'a') as f: f.write('fetched\\n')\n"
        "    time.sleep(0.5)\n"
        "    return content(7)\n"
        "cache = DiskCache(Path(sys.argv[1]) / 'cache', 10**9, no_report)\n"
        "assert cache.read(0, SIZE, fetch, 7) == content(7)\n"
    )
    processes = [start(program, tmp_path) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"


@pytest.mark.parametrize("moment", ["fetching", "writing"])
def test_a_killed_process_leaves_nothing_that_is_read_or_waited_for(start: Start, tmp_path: Path, moment: str) -> None:
    program = (
        "def stop(*_):\n"
        "    print('there', flush=True)\n"
        "    time.sleep(60)\n"
        "    return content(7)\n"
        "if sys.argv[2] == 'writing':\n"
        "    os.fdatasync = stop\n"
        "    fetch = lambda: b'x' * SIZE\n"
        "else: fetch = stop\n"
        "DiskCache(Path(sys.argv[1]), 10**9, no_report).read(0, SIZE, fetch, 7)\n"
    )
    process = start(program, tmp_path, moment)
    assert process.stdout
    assert process.stdout.readline() == "there\n"
    assert stored(tmp_path) == (SIZE + HEADER_BYTES if moment == "writing" else 0)
    cache = DiskCache(tmp_path, 10**9, no_report)  # while the other is alive its part stays
    assert stored(tmp_path) == (SIZE + HEADER_BYTES if moment == "writing" else 0)
    process.kill()
    process.wait()
    DiskCache(tmp_path, 10**9, no_report)
    assert stored(tmp_path) == 0
    assert cache.read(0, SIZE, lambda: content(7), 7) == content(7)
    assert stored(tmp_path) == SIZE + HEADER_BYTES


def test_a_part_left_by_a_killed_process_does_not_take_room_for_ever(tmp_path: Path) -> None:
    """Found by those that run on, when the room gets short."""
    cache = DiskCache(tmp_path, 4 * (SIZE + HEADER_BYTES), no_report)
    (tmp_path / "parts" / "abandoned").write_bytes(b"x" * 3 * SIZE)
    for k in range(5):
        cache.read(0, 1, partial(content, k), k)
    assert not (tmp_path / "parts" / "abandoned").exists()


def test_a_full_disk_is_told_once_and_done_without(tmp_path: Path) -> None:
    told: list[str] = []
    cache = DiskCache(tmp_path, 10**9, told.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))  # writing further fails, as on a full disk
    try:
        for k in range(3):
            assert cache.read(5, 10, partial(content, k), k) == content(k)[5:10]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(told) == 1
    assert f"the cache in {tmp_path} cannot be written to" in told[0]
    assert "set data.cache_dir or data.cache_gb" in told[0]
    assert not cache.usable
    assert stored(tmp_path) == 0


def test_a_folder_that_cannot_be_made_is_told_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    cache = DiskCache(tmp_path / "file" / "cache", 10**9, told.append)
    assert len(told) == 1
    assert cache.read(0, SIZE, lambda: content(1), 1) == content(1)
    assert len(told) == 1


def test_errors_of_the_fetch_are_passed_on_and_nothing_is_kept(cache: DiskCache) -> None:
    def fail() -> bytes:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        cache.read(0, 1, fail, 1)
    assert cache.usable
    assert cache.read(0, SIZE, lambda: content(1), 1) == content(1)


def test_a_cache_that_is_deleted_under_way_is_made_again(cache: DiskCache, tmp_path: Path) -> None:
    cache.read(0, 1, lambda: content(1), 1)
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cache.read(0, SIZE, lambda: content(2), 1) == content(2)
    assert cache.read(0, SIZE, no_fetch, 1) == content(2)
