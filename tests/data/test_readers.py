"""The processes that read: killed, given up, several of them; the batches stay the same and nothing is left."""

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from ranks import no_bad_image

from pipeline.config.data import DataConfig
from pipeline.data.index import Index, load_index
from pipeline.data.indexing.build import build_index, drop_rows
from pipeline.data.loading import reader_process
from pipeline.data.loading.loader import LoaderContext, TrainLoader
from pipeline.data.loading.read import StorageAwayError
from pipeline.data.loading.readers import MAX_DEATHS, MODULE, ReaderDiedError

CPU = torch.device("cpu")
CFG = DataConfig(train="-", val="-", image_size=16, val_resize=16)
STOP = 24


def loader(index: Index, warnings: list[str], cfg: DataConfig = CFG, global_batch: int = 40) -> TrainLoader:
    context = LoaderContext(0, 1, CPU, 1)
    # More than half of MIN_DECODED: each batch is read for itself.
    return TrainLoader(index, cfg, context, no_bad_image, global_batch=global_batch, seed=3, warn=warnings.append)


def readers() -> list[psutil.Process]:
    """The processes that read for this one."""
    children = psutil.Process().children()
    return [p for p in children if p.status() != psutil.STATUS_ZOMBIE and MODULE in p.cmdline()]


def wait_for_end(process: psutil.Process) -> None:
    deadline = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pixels(batches: Iterator[object]) -> list[torch.Tensor]:
    return [batch.images.clone() for batch in batches]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def index(digits: Path) -> Index:
    return build_index(str(digits / "train"))[0]


@pytest.fixture(scope="module")
def undisturbed(index: Index) -> list[torch.Tensor]:
    with closing(loader(index, [])) as train:
        return pixels(train.from_step(0, STOP))


def assert_same(batches: list[torch.Tensor], undisturbed: list[torch.Tensor]) -> None:
    assert len(batches) == len(undisturbed)
    assert all(torch.equal(a, b) for a, b in zip(batches, undisturbed, strict=True))


@pytest.mark.parametrize(("global_batch", "joined"), [(40, 1), (8, 8)])
def test_a_process_that_is_killed_is_replaced(index: Index, global_batch: int, joined: int) -> None:
    """At the start, while it reads ahead, and again; no batch is lost, doubled or changed."""
    warnings: list[str] = []
    stop = STOP * joined
    with closing(loader(index, [], global_batch=global_batch)) as train:
        undisturbed = pixels(train.from_step(0, stop))
    with closing(loader(index, warnings, global_batch=global_batch)) as train:
        stream, batches = train.from_step(0, stop), []
        for step in range(stop):
            if step in (0, joined, 7 * joined):
                (reader,) = readers()
                assert not [m.path for m in reader.memory_maps() if m.path.startswith("/dev/shm")], "it might be left"
                reader.kill()
                wait_for_end(reader)
            batches.append(next(stream).images.clone())
    assert_same(batches, undisturbed)
    assert warnings == ["a process that reads images has ended (SIGKILL); another reads on"] * 3
    assert readers() == []


def test_one_that_cannot_live_ends_the_attempt(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.loading.readers.MODULE", "pipeline.no_such_module")
    warnings: list[str] = []
    with closing(loader(index, warnings)) as train, pytest.raises(ReaderDiedError, match="at last by exit code 1"):
        next(train.from_step(0, STOP))
    assert len(warnings) == MAX_DEATHS


def test_several_processes_take_turns(index: Index, undisturbed: list[torch.Tensor]) -> None:
    cfg = DataConfig(train="-", val="-", image_size=16, val_resize=16, read_processes=3, prefetch=1)
    with closing(loader(index, [], cfg)) as train:
        assert len(readers()) == 3
        assert_same(pixels(train.from_step(0, STOP)), undisturbed)


def test_a_stream_may_be_given_up_for_another(index: Index, undisturbed: list[torch.Tensor]) -> None:
    """An evaluation that is left off, say: what was read ahead for it is nowhere in the next one."""
    with closing(loader(index, [])) as train:
        for _ in range(3):
            given_up = train.from_step(5, STOP)
            next(given_up)
            del given_up
            assert_same(pixels(train.from_step(0, 3)), undisturbed[:3])


def test_the_table_stays_the_same_whatever_becomes_of_its_file(
    index: Index, undisturbed: list[torch.Tensor], tmp_path: Path
) -> None:
    """A new index in the same place is another data set, also for a process that is started later."""
    file = tmp_path / "index.arrow"
    index.save(file)
    mapped = load_index(file)
    drop_rows(index, [0]).save(file)
    with closing(loader(mapped, [])) as train:
        assert_same(pixels(train.from_step(0, STOP)), undisturbed)


def test_a_process_ends_with_its_parent(index: Index, tmp_path: Path) -> None:
    """However that has ended."""
    index.save(tmp_path / "index.arrow")
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_readers import *
train = loader(load_index(Path({str(tmp_path / "index.arrow")!r})), [])
next(train.from_step(0, STOP))
print(readers()[0].pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout as said:
        reader = psutil.Process(int(said.readline()))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for_end(reader)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageAwayError("it does not answer"), "away"),
        (OSError(errno.ENOMEM, "no memory"), "failed"),
        (LookupError("no row"), "failed"),
    ],
)
def test_only_a_storage_that_does_not_answer_is_told_as_that(error: Exception, kind: str) -> None:
    """What is wrong with this machine is not waited for as a storage is."""
    told = list[tuple[object, ...]]()

    def fails() -> None:
        raise error

    reader_process._reporting(fails, lambda *message: told.append(message))()
    ((said, text),) = told
    assert said == kind
    assert str(error) in str(text)
