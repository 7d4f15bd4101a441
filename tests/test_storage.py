"""Storage: a directory and an object store are used alike; what fails is an OSError. The S3 API is moto's server."""

import errno
import io
import os
import pickle
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from s3 import s3_storage
from web import web_server

from pipeline.config.loading import load
from pipeline.failures import CheckpointError, retry
from pipeline.local_files import alone, fsync, remove_leftovers, temporary_name
from pipeline.runs import checkpoint, retention
from pipeline.storage import Storage
from pipeline.training.state import TrainState

TREE = {"a b/%20#?&é.txt": b"odd", "a b/c/empty": b"", "x.tar": bytes(range(256)) * 100}
META: dict[str, Any] = {"training_id": "t", "fingerprint": "f", "classes": ["a", "b"], "metrics": {}}


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    with s3_storage() as storage:
        yield storage


@pytest.fixture(params=["directory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A place that does not exist yet."""
    if request.param == "directory":
        return Storage(tmp_path) / "place"
    storage: Storage = request.getfixturevalue("s3")
    return storage / tmp_path.name


def test_files_come_and_go(folder: Storage, tmp_path: Path) -> None:
    assert folder.names() == []
    folder.make()
    folder.write_bytes("b", b"two")
    folder.write_bytes("b", b"three")
    assert folder.read_bytes("b") == b"three"
    assert folder.sizes()["b"] == 5
    (tmp_path / "source").write_bytes(b"x" * 10)
    if not folder.local:
        folder.upload(tmp_path / "source", "copy")
        folder.download("copy", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == b"x" * 10
        assert (folder / "copy").fetch().read_bytes() == b"x" * 10
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("missing")
    folder.remove()
    folder.remove()
    assert folder.names() == []


@pytest.fixture(params=["directory", "s3", "web", "web_without_parts"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Three files, to read; their names are not all plain."""
    here = Storage(tmp_path / "tree")
    for name, content in TREE.items():
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if request.param == "directory":
        yield here
    elif request.param == "s3":
        there = request.getfixturevalue("s3") / tmp_path.name
        for name, _ in here.walk():
            there.upload(tmp_path / "tree" / name, name)
        yield there
    else:
        with web_server(tmp_path / "tree") as server:
            server.sends_parts = request.param == "web"
            yield server.storage


def test_files_below_are_found_and_read_anywhere_in(tree: Storage) -> None:
    assert list(tree.walk()) == [(name, len(content)) for name, content in TREE.items()]
    assert tree.names() == pickle.loads(pickle.dumps(tree)).names() == ["a b", "x.tar"]
    for name, content in TREE.items():
        assert tree.read_bytes(name) == content
        with tree.open(name) as f:
            start = f.seek(min(100, len(content)))
            assert f.read(50) == content[start : start + 50]
            assert f.tell() == min(150, len(content))
    with tree.open("x.tar") as f, io.BufferedReader(f) as buffered:
        buffered.seek(-7, 2)
        assert buffered.read() == TREE["x.tar"][-7:]
    with pytest.raises(FileNotFoundError):
        tree.open("missing")
    assert list((tree / "missing").walk()) == []
    assert list((tree / "a b").walk()) == [(name[4:], len(c)) for name, c in TREE.items() if name.startswith("a b/")]
    assert (tree / "a b").name == "a b"


def test_a_web_server_that_is_away_is_no_empty_folder() -> None:
    with web_server(Path.cwd()) as server:
        away = server.storage
    for action in (away.names, lambda: list(away.walk()), lambda: away.open("x"), lambda: away.read_bytes("x")):
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{server.server_port}/.*Connect") as caught:
            action()
        assert not isinstance(caught.value, FileNotFoundError)


def test_a_large_file_of_a_web_server_that_sends_only_whole_ones_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of it would be a download of all."""
    monkeypatch.setattr("pipeline.http_storage.MAX_WHOLE", 100)
    (tmp_path / "x.tar").write_bytes(b"x" * 101)
    with web_server(tmp_path) as server:
        server.sends_parts = False
        with server.storage.open("x.tar") as f, pytest.raises(OSError, match="does not send parts of files"):
            f.read(10)


def test_a_web_server_is_not_written_to(tmp_path: Path) -> None:
    with web_server(tmp_path) as server, pytest.raises(OSError, match="cannot be written to"):
        server.storage.make()


def test_kinds_that_only_fsspec_knows() -> None:
    folder = Storage("memory://folder")
    folder.write_bytes("a/b", b"123")
    assert list(folder.walk()) == [("a/b", 3)]
    assert folder.read_bytes("a/b") == b"123"


def test_names_and_travels(folder: Storage) -> None:
    child = folder / "runs" / "a"
    assert child.name == "a"
    assert child.parent.uri == (folder / "runs").uri
    assert pickle.loads(pickle.dumps(child)).uri == child.uri


def test_file_uris_are_paths(tmp_path: Path) -> None:
    assert Storage(f"file://{tmp_path}").local == tmp_path


def test_an_unknown_kind_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="s4"):
        Storage("s4://bucket/runs").check()


@pytest.fixture
def save(folder: Storage) -> Callable[[int], Storage]:
    folder.make()
    cfg = load(None, ["data.train=x", "data.val=x", "model.depth=18", "optim.momentum=0", "optim.nesterov=false"])
    state = TrainState.create(cfg, 2, torch.device("cpu"))

    def save_at(step: int) -> Storage:
        state.step = step
        return checkpoint.save(folder, state.state_dict(), cfg, META).place

    return save_at


def test_the_newest_whole_checkpoint_is_found(folder: Storage, save: Callable[[int], Storage]) -> None:
    """After an upload that broke off, and with a bit of one flipped in the store."""
    save(1)
    flipped, half = save(2), folder / "step_00000003"
    (name,) = (file for file in flipped.sizes() if file.startswith("state"))
    content = bytearray(flipped.read_bytes(name))
    content[len(content) // 2] ^= 1
    flipped.write_bytes(name, bytes(content))
    if half.local:
        half.local.mkdir()
    half.write_bytes("state.pt", bytes(content[: len(content) // 2]))
    problems: list[str] = []
    found = checkpoint.newest_valid(folder, problems.append)
    assert found is not None
    assert found.step == 1
    assert found.state()["step"] == 1
    assert ["step_00000003" in problems[0], "meta.json is missing" in problems[0]] == [True, True]
    assert ["step_00000002" in problems[1], "SHA-256" in problems[1]] == [True, True]
    assert len(problems) == 2


def test_old_ones_are_deleted_everywhere(folder: Storage, save: Callable[[int], Storage]) -> None:
    for step in (1, 2, 3):
        save(step)
    retention.prune(folder, 2, None, 3)
    steps = ["step_00000002", "step_00000003"]
    assert [name for name in folder.names() if name.startswith("step")] == steps
    copies = steps if folder.local else steps[-1:]
    assert sorted(p.name for p in folder.local_dir.glob("step*")) == copies


@pytest.mark.parametrize("folder", ["s3"], indirect=True)
def test_the_ranks_of_a_node_fetch_a_checkpoint_once_and_leave_no_older_ones(
    save: Callable[[int], Storage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ResNet-152's takes 724 MB: a node of eight ranks would fetch 5.8 GB at once, and keep each restart's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    fetched, download = list[str](), Storage.download

    def counted(self: Storage, name: str, to: Path) -> None:
        fetched.append(f"{self.name}/{name}")
        download(self, name, to)

    places = [save(step) for step in (1, 2, 3)]
    shutil.rmtree(places[0].parent.local_dir)
    monkeypatch.setattr(Storage, "download", counted)
    for place in places:
        with ThreadPoolExecutor(8) as ranks:
            found = list(ranks.map(lambda _: checkpoint.load(place, use_copy=True), range(8)))  # noqa: B023
        assert [one.state()["step"] for one in found] == [found[0].step] * 8
        retention.forget_copies(found[0].place.parent, found[0].place.name)
    with alone(places[0].parent.local_dir):  # another process fetches one
        retention.forget_copies(places[0].parent)
    assert [path.name for path in places[0].parent.local_dir.glob("step_*")] == ["step_00000003"]
    large = [f"step_0000000{step}/{name}" for step in (1, 2, 3) for name in ("state-", "config-")]
    assert [name.partition("-")[0] + "-" for name in fetched if "meta.json" not in name] == large
    assert [path.name for path in places[0].parent.local_dir.glob("step_*")] == ["step_00000003"]


def test_a_store_that_is_away_is_no_reason_to_take_an_older_checkpoint(
    folder: Storage, save: Callable[[int], Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    real, answers = Storage.names, iter([False, False, True, True])

    def names(self: Storage) -> list[str]:
        if not next(answers):
            raise OSError("connection refused")
        return real(self)

    monkeypatch.setattr(Storage, "names", names)
    monkeypatch.setattr("time.sleep", lambda _: None)
    reports: list[str] = []
    found = retry(lambda: checkpoint.newest_valid(folder, pytest.fail), reports.append, 30)
    assert found is not None
    assert reports == [
        "the storage does not answer, trying again: connection refused",
        "it works again, after 2 failed tries",
    ]


def test_damage_in_all_of_them_is_an_error(folder: Storage, save: Callable[[int], Storage]) -> None:
    """To begin at step 0 would hide that a week of work is in danger."""
    save(1).write_bytes("meta.json", b"{}")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* can be used .*move them away"):
        checkpoint.newest_valid(folder, lambda _: None)


def test_a_file_system_that_syncs_no_directories_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of FUSE and SMB; a file's own content they must hold."""

    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    fsync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        fsync(tmp_path / "file")


def test_what_a_machine_keeps_is_its_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where all may write, another user could have named the MLflow server that gets the records."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Storage("s3://bucket/runs").local_dir.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert Storage("s3://bucket/runs").local_dir.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match=rf"{folder} is not a folder of this user's; have it removed, or set"):
        _ = Storage("s3://bucket/runs").local_dir
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        _ = Storage("s3://bucket/runs").local_dir


def dead_process() -> int:
    """The number of one that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left_by(name: str, process: int, host: str = "") -> str:
    return f".{name}.{host or socket.gethostname()}.{process}"


def test_what_dead_processes_were_writing_goes(tmp_path: Path) -> None:
    """724 MB of a ResNet-152's checkpoint for each kill, on a machine that the writer does not come back to."""
    dead = dead_process()
    files = [left_by("a.pt", dead), left_by("a.pt", os.getpid()), left_by("b.pt", dead), ".a.pt.part", "a.pt"]
    files.append(left_by("a.pt", dead, "another-host"))  # which may have the same folder
    for name in (*files, old := left_by("a.pt", dead, "container")):
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / old, (1e9, 1e9))
    (tmp_path / left_by("step_00000003", dead)).mkdir()
    (tmp_path / left_by("step_00000003", dead) / "state.pt").write_bytes(b"x")
    remove_leftovers(tmp_path, "a.pt")
    remove_leftovers(tmp_path, "step_*")
    assert {path.name for path in tmp_path.iterdir()} == {*files[1:]}
    assert temporary_name("a.pt") == files[1]


@pytest.mark.parametrize("folder", ["s3"], indirect=True)
def test_no_leftovers_gather_on_a_machine_that_rank_0_has_left(
    folder: Storage, save: Callable[[int], Storage], tmp_path: Path
) -> None:
    dead, alive = dead_process(), left_by("step_00000004", os.getpid())
    (folder.local_dir / left_by("step_00000003", dead)).mkdir(parents=True)
    (folder.local_dir / alive).mkdir()
    retention.forget_copies(folder)
    assert [path.name for path in folder.local_dir.iterdir()] == [alive]
    folder.write_bytes("train.arrow", b"index")
    (tmp_path / left_by("train.arrow", dead)).write_bytes(b"half of it")
    folder.download("train.arrow", tmp_path / "train.arrow")
    assert {path.name for path in tmp_path.glob("*.arrow*")} == {"train.arrow"}
    assert not list(tmp_path.glob(".train.arrow.*"))


@pytest.mark.parametrize("folder", ["s3"], indirect=True)
def test_a_copy_is_as_old_as_the_original(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's clock that is behind the store's would have each of its processes fetch it again, and again."""
    folder.write_bytes("train.arrow", b"index")
    copy, fetched = (folder / "train.arrow").fetch(), list[str]()
    (info,) = folder._list()
    assert copy.stat().st_mtime == int(info.mtime.timestamp()), "whatever this machine's clock says"
    download = Storage.download

    def counted(self: Storage, name: str, to: Path) -> None:
        fetched.append(name)
        download(self, name, to)

    monkeypatch.setattr(Storage, "download", counted)
    assert (folder / "train.arrow").fetch().read_bytes() == b"index"
    assert fetched == []
    os.utime(copy, (1e9, 1e9))
    assert (folder / "train.arrow").fetch().read_bytes() == b"index"
    assert fetched == ["train.arrow"]


@pytest.mark.parametrize("folder", ["s3"], indirect=True)
def test_the_ranks_of_a_node_fetch_an_index_once(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_bytes("train.arrow", b"index")
    fetched, download = list[str](), Storage.download

    def counted(self: Storage, name: str, to: Path) -> None:
        fetched.append(name)
        time.sleep(0.2)
        download(self, name, to)

    monkeypatch.setattr(Storage, "download", counted)
    with ThreadPoolExecutor(4) as ranks:
        files = list(ranks.map(lambda _: (folder / "train.arrow").fetch(), range(4)))
    assert [file.read_bytes() for file in files] == [b"index"] * 4
    assert fetched == ["train.arrow"]
