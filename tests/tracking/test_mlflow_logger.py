"""The outbox and the logger: nothing waits, nothing is lost, nothing twice, in order."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from s3 import s3_storage

from pipeline.runs.checkpoint import Checkpoint
from pipeline.storage import Storage
from pipeline.tracking import mlflow_logger
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.tracking.mlflow_run import ATTEMPT, MlflowRun, Target, find_run
from pipeline.tracking.mlflow_store import tracking_uri
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.records import End, Metrics, Record, Start, Text
from pipeline.tracking.uploads import Uploads


def metric(step: int, value: float = 0.0, name: str = "loss") -> Metrics:
    return Metrics(step, 0, {name: value})


def unsent(outbox: Outbox) -> list[Metrics]:
    """The records that wait, all of them metrics."""
    return [record for record, _ in outbox.unsent() if isinstance(record, Metrics)]


def test_outbox_keeps_order_and_survives_its_process(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, pytest.fail)
    for step in (1, 2, 3):
        outbox.append(metric(step))
    outbox.mark_sent(outbox.unsent()[0][1])
    outbox.close()
    with outbox.path.open("ab") as f:
        f.write(b'{"kind": "metr')  # a process killed while writing
    reopened = Outbox(tmp_path, pytest.fail)
    assert [record.step for record in unsent(reopened)] == [2, 3]
    reopened.append(metric(4))
    assert [record.step for record in unsent(reopened)] == [2, 3, 4]
    reopened.close()


def test_outbox_drops_steps_that_were_logged_before(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, pytest.fail)
    outbox.append(metric(10))
    outbox.append(metric(20))
    outbox.mark_sent(outbox.unsent()[-1][1])
    assert outbox.path.stat().st_size == 0  # what has arrived takes no room
    outbox.append(metric(20))
    outbox.append(metric(30))
    outbox.append(metric(10, name="other"))
    outbox.close()
    reopened = Outbox(tmp_path, pytest.fail)
    reopened.append(metric(30))
    values = [(record.step, record.values) for record in unsent(reopened) if record.values]
    assert values == [(30, {"loss": 0.0}), (10, {"other": 0.0})]
    reopened.close()


def test_a_long_backlog_is_taken_in_parts_and_keeps_no_step_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow was away for days: the thread that sends must not parse all of it under the lock that a step needs."""
    outbox, parse = Outbox(tmp_path, print), json.loads
    for step in range(1000):
        outbox.append(metric(step))
    outbox.append(Text("x" * 10_000, "large"))
    outbox.append(metric(1000))

    def checked(line: bytes) -> object:
        assert not outbox._lock.locked()
        return parse(line)

    seen = list[Record]()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.tracking.outbox.json.loads", checked)
        while head := outbox.head(max_bytes=1000):
            assert len(head) < 20
            seen += [record for record, _ in head]
            outbox.mark_sent(head[-1][1])
    assert [getattr(record, "step", None) for record in seen] == [*range(1000), None, 1000]
    assert outbox.unsent() == []
    outbox.close()


def test_outbox_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, pytest.fail)
    outbox.append(metric(1))
    outbox.close()
    with outbox.path.open("ab") as f:
        f.write(b"garbage\n{}\n")
    problems: list[str] = []
    reopened = Outbox(tmp_path, problems.append)
    reopened.append(metric(2))
    assert [record.step for record in unsent(reopened)] == [1, 2]
    assert len(problems) == 1
    assert "2 unreadable lines of" in problems[0]
    reopened.close()


def test_an_outbox_that_is_cleaned_up_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a record of a killed process is taken out as the outbox opens; the process may be killed in that, too."""
    outbox = Outbox(tmp_path, pytest.fail)
    outbox.append(metric(1))
    outbox.close()
    with outbox.path.open("ab") as f:
        f.write(b'{"kind": "metr')

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="Input/output error"):
            Outbox(tmp_path, pytest.fail)
    reopened = Outbox(tmp_path, pytest.fail)
    assert [record.step for record in unsent(reopened)] == [1]
    reopened.close()


def test_a_limited_end_does_not_wait_for_a_long_backlog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a node is drained: MLflow answers, but slowly."""
    send = MlflowRun.send

    def slow(run: MlflowRun, records: list[Record]) -> None:
        time.sleep(0.5)
        send(run, records)

    monkeypatch.setattr(MlflowRun, "send", slow)
    one = logger(tracking_uri(None, Storage(tmp_path)), tmp_path / "run")
    for number in range(60):
        one.set_tags({str(number): number})
    began = time.monotonic()
    assert one.close("KILLED", 60, limit_s=1.0) > 0
    assert time.monotonic() - began < 20
    one.close(None, 60)  # closes the outbox


def test_a_disk_that_fails_in_the_middle_of_a_record_tears_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it reach the training: half of the record is there, and cannot even be cut off for now."""
    problems: list[str] = []
    outbox = Outbox(tmp_path, problems.append)
    outbox.append(metric(1))
    real = outbox._file

    class Failing:
        def fileno(self) -> int:
            return real.fileno()

        def write(self, content: bytes) -> int:
            real.write(content[:9])
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def truncate(self, size: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(outbox, "_file", Failing())
    for step in (2, 3):
        outbox.append(metric(step))
    assert [record.step for record in unsent(outbox)] == [1]
    assert len(problems) == 1
    monkeypatch.setattr(outbox, "_file", real)
    outbox.append(metric(4))
    outbox.close()
    reopened = Outbox(tmp_path, pytest.fail)
    assert [record.step for record in unsent(reopened)] == [1, 2, 3, 4]
    reopened.close()


def test_a_call_to_mlflow_that_never_ends_does_not_keep_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, left, beats = threading.Event(), threading.Event(), list[float]()

    def hang(*_: object, **__: object) -> None:
        hanging.set()
        left.wait(60)

    monkeypatch.setattr(mlflow_logger, "MLFLOW_CALL_S", 0.5)
    monkeypatch.setattr(mlflow_logger, "MlflowRun", hang)
    target = Target("http://127.0.0.1:9", "x", str(tmp_path), "t")
    logger = MlflowLogger(target, tmp_path / "mlflow", lambda _: None)
    logger.log_metrics(1, {"loss": 0.0})
    assert logger.close("FINISHED", 0.2, heartbeat=lambda: beats.append(time.monotonic())) == 2
    assert hanging.is_set()
    assert len(beats) > 2
    left.set()
    logger.close(None, 10)  # closes the outbox


def test_a_folder_that_is_away_for_a_while_does_not_hurt(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "here", pytest.fail)
    outbox.append(metric(1))
    (tmp_path / "here").rename(tmp_path / "away")
    outbox.append(metric(2))
    (_, first), _ = outbox.unsent()
    with pytest.raises(OSError, match="No such file"):
        outbox.mark_sent(first)
    (tmp_path / "away").rename(tmp_path / "here")
    assert [record.step for record in unsent(outbox)] == [1, 2]
    outbox.mark_sent(first)
    outbox.close()
    reopened = Outbox(tmp_path / "here", pytest.fail)
    assert [record.step for record in unsent(reopened)] == [2]
    reopened.close()


def logger(uri: str, run_dir: Path, problems: list[str] | None = None) -> MlflowLogger:
    said: list[str] = [] if problems is None else problems
    logger = MlflowLogger(Target(uri, "pipeline", str(run_dir), f"id-{run_dir.name}"), run_dir / "mlflow", said.append)
    logger.start()
    return logger


def test_a_disk_that_fails_is_not_called_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the run's folder is away for a while."""
    problems, place = list[str](), tmp_path / "run" / "mlflow"
    one = logger(tracking_uri(None, Storage(tmp_path)), tmp_path / "run", problems)

    def away(_: object, offset: int) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{place}/sent.tmp")

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "mark_sent", away)
        assert one.close("KILLED", 3) > 0
    assert [problem.partition(":")[0] for problem in problems] == [
        f"{place} cannot be used, records wait in {place}/outbox.jsonl"
    ]


def test_everything_logged_arrives_in_one_run_over_two_attempts(tmp_path: Path) -> None:
    uri = tracking_uri(None, Storage(tmp_path))
    source = tmp_path / "checkpoint"
    source.mkdir()
    (source / "state.pt").write_bytes(b"weights")
    one = logger(uri, tmp_path / "run")
    one.log_params({"a": 1, "b": None})
    one.log_metrics(1, {"loss": 2.5})
    one.log_folder(source, "checkpoints/step_1")
    (source / "state.pt").unlink()  # it was set aside already
    assert one.close("KILLED", 60) == 0
    two = logger(uri, tmp_path / "run")
    two.log_params({"a": 2, "c": 3})
    two.log_metrics(1, {"loss": 9.0})
    for step in range(2, 2000):
        two.log_metrics(step, {"loss": 1.5, "lr": 0.1})
    two.set_tags({"t": "x"})
    two.log_text("k: v", "config/two.yaml")
    assert two.close("FINISHED", 60) == 0
    assert (one.run_id, one.experiment_id) == (two.run_id, two.experiment_id)
    client = mlflow.MlflowClient(uri)
    run = client.get_run(one.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1", "b": "None", "c": "3"}
    assert run.data.tags["t"] == "x"
    history = sorted((m.step, m.value) for m in client.get_metric_history(one.run_id, "loss"))
    assert history == [(1, 2.5), *((step, 1.5) for step in range(2, 2000))]
    local = client.download_artifacts(one.run_id, "checkpoints/step_1/state.pt", str(tmp_path))
    assert Path(local).read_bytes() == b"weights"
    assert sorted(p.name for p in (tmp_path / "run" / "mlflow").iterdir()) == [
        "id",
        "outbox.jsonl",
        "sent.json",
        "target.json",
    ]
    found = find_run(uri, str(one.run_id))
    assert found is not None
    assert found.local == tmp_path / "run"
    assert find_run(uri, "0" * 32) is None


def log_a_folder(runs: Path, source: Path) -> None:
    source.mkdir()
    (source / "state.pt").write_text(source.name)
    one = logger(tracking_uri(None, Storage(runs)), runs / "run")
    one.log_folder(source, f"checkpoints/{source.name}")
    assert one.close("KILLED", 60) == 0


def test_artifacts_move_with_their_storage(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    # MLflow remembers a run's place as long as the process lives.
    first = multiprocessing.get_context("spawn").Process(target=log_a_folder, args=(old, tmp_path / "one"))
    first.start()
    first.join(120)
    assert first.exitcode == 0
    shutil.move(old, new)
    log_a_folder(new, tmp_path / "two")
    assert not old.exists()
    assert sorted(file.read_text() for file in (new / "mlartifacts").rglob("state.pt")) == ["one", "two"]
    client = mlflow.MlflowClient(tracking_uri(None, Storage(new)))
    found = client.search_runs([client.get_experiment_by_name("pipeline").experiment_id])
    (to := tmp_path / "got").mkdir()
    client.download_artifacts(found[0].info.run_id, "checkpoints", str(to))
    assert sorted(file.read_text() for file in to.rglob("state.pt")) == ["one", "two"]


def test_system_metrics_go_on_after_a_call_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    uri = tracking_uri(None, Storage(tmp_path))
    run = MlflowRun(Target(uri, "new", str(tmp_path / "run"), uuid.uuid4().hex))
    fails = iter([True, True])
    ask = mlflow.MlflowClient.get_run

    def get_run(client: mlflow.MlflowClient, run_id: str) -> Any:
        if (run_id, threading.current_thread().name) == (run.id, "SystemMetricsMonitor") and next(fails, False):
            raise ConnectionError("away")
        return ask(client, run_id)

    monkeypatch.setattr(mlflow.MlflowClient, "get_run", get_run)
    run.send([Start(ATTEMPT)])
    deadline = time.monotonic() + 60
    while not any(key.startswith("system/") for key in run.last_steps()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert next(fails, None) is None, "it has failed twice"
    run.send([End("FINISHED")])


def test_the_oldest_folder_gives_way_on_a_full_disk_and_blocks_nothing(tmp_path: Path) -> None:
    one = logger(uri := tracking_uri(None, Storage(tmp_path)), tmp_path / "run")
    for name in ("step_00000001", "step_00000002", "profile"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_text(name)
        one.log_folder(tmp_path / name, f"checkpoints/{name}")
    shutil.rmtree(tmp_path / "step_00000002")
    assert one.staging.drop_oldest() == "the upload of step_00000002 to MLflow", "whose files are here alone"
    assert one.staging.drop_oldest() == "the upload of step_00000001 to MLflow", "whose checkpoint can be deleted next"
    assert one.staging.drop_oldest() is None
    assert one.close("FINISHED", 60) == 0
    logged = mlflow.MlflowClient(uri).list_artifacts(str(one.run_id), "checkpoints")
    assert [Path(one.path).name for one in logged] == ["profile"]


def test_no_more_than_some_checkpoints_wait_for_an_mlflow_that_is_away(tmp_path: Path) -> None:
    """With mlflow.checkpoints=all their hard links would hold each one that the run has deleted, to the end."""
    one, warned = logger("http://127.0.0.1:9", tmp_path / "run"), list[str]()
    uploads = Uploads(one, warned.append, 1.0)
    for step in range(1, 51):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        for name in ("state.pt", "meta.json"):
            (folder / name).write_text(name)
        uploads.checkpoint(Checkpoint(Storage(folder), folder, {"step": step}))
        if step > 2:
            shutil.rmtree(tmp_path / f"step_{step - 2:08d}")
    waiting = sorted(path.stem for path in (tmp_path / "run/mlflow").glob("step_*/"))
    one.outbox.close()
    assert waiting == [f"step_{step:08d}" for step in range(43, 51)], "the newest 8"
    assert [line.rpartition(", ")[2] for line in warned] == [
        f"{n} of this attempt's so far" for n in (1, 2, 4, 8, 16, 32)
    ]
    assert warned[0].startswith(
        "MLflow does not take checkpoints as fast as they come, and no more than 8 wait: the upl"
    )


@pytest.mark.parametrize("back", ["with its outbox", "as a new machine"])
def test_a_run_that_moves_between_machines_logs_each_step_once(
    back: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store each machine has an outbox of its own, and MLflow is away all the time."""
    uri, problems = tracking_uri(None, Storage(tmp_path)), list[str]()

    attempts = itertools.count(1)

    def attempt(machine: str, steps: Iterable[int], kept: int, *, away: bool = True) -> None:
        """Train on a machine that is lost; its last checkpoint comes after step `kept`."""
        with monkeypatch.context() as patch:
            if away:
                patch.setattr(MlflowRun, "__init__", lambda *_, **__: 1 / 0)
            target = Target(uri, "new", run, "training")
            one = MlflowLogger(target, tmp_path / machine, problems.append)
            one.take_backlog(f"{next(attempts):08d}")
            for step in steps:
                one.log_metrics(step, {"loss": 10.0 * step})
                if step == kept:
                    one.save_backlog()
            if away:
                one.close(None, 0)
            else:
                assert one.close("FINISHED", 60) == 0

    with s3_storage() as bucket:
        run = (bucket / "run").uri
        attempt("A", range(1, 5), kept=3)
        attempt("B", range(4, 8), kept=6)
        if back == "as a new machine":
            shutil.rmtree(tmp_path / "A")
        attempt("A", range(7, 9), kept=8)
        attempt("B", range(9, 10), kept=9, away=False)
    store = mlflow.MlflowClient(uri)
    found = store.search_runs([store.get_experiment_by_name("new").experiment_id])
    history = store.get_metric_history(found[0].info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, 10.0 * step) for step in range(1, 10)]


@pytest.mark.parametrize("harm", ["sent.json", "the folder"])
def test_an_outbox_that_forgot_logs_nothing_twice(tmp_path: Path, harm: str) -> None:
    """A damaged note of what was sent, or a machine whose disk is new: MLflow itself knows."""
    uri = tracking_uri(None, Storage(tmp_path))
    one = logger(uri, tmp_path / "run")
    one.log_metrics(1, {"loss": 1.0})
    one.log_metrics(2, {"loss": 2.0})
    assert one.close("KILLED", 60) == 0
    if harm == "sent.json":
        (tmp_path / "run/mlflow/sent.json").write_text("")
    else:
        shutil.rmtree(tmp_path / "run")
    two = logger(uri, tmp_path / "run")
    two.log_metrics(2, {"loss": 2.0})
    two.log_metrics(3, {"loss": 3.0})
    assert two.close("FINISHED", 60) == 0
    client = mlflow.MlflowClient(uri)
    assert [m.step for m in client.get_metric_history(str(two.run_id), "loss")] == [1, 2, 3]


def test_a_record_that_mlflow_refuses_is_told_and_does_not_block(tmp_path: Path) -> None:
    problems: list[str] = []
    one = logger(tracking_uri(None, Storage(tmp_path)), tmp_path / "run", problems)
    one.log_metrics(1, {"not\nlegal": 1.0})
    one.log_metrics(2, {"loss": 1.0})
    assert one.close("FINISHED", 60) == 0
    assert len(problems) == 1
    assert "MLflow refused a record of kind metrics, dropped" in problems[0]
    client = mlflow.MlflowClient(tracking_uri(None, Storage(tmp_path)))
    assert client.get_run(one.run_id).info.status == "FINISHED"


def test_a_folder_that_is_gone_or_refused_blocks_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = mlflow.MlflowClient.log_artifacts

    def log_artifacts(client: mlflow.MlflowClient, run_id: str, source: str, to: str) -> None:
        if to == "refused":
            raise mlflow.MlflowException("too large", error_code=INVALID_PARAMETER_VALUE)
        send(client, run_id, source, to)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", log_artifacts)
    problems: list[str] = []
    uri = tracking_uri(None, Storage(tmp_path))
    one = logger(uri, tmp_path / "run", problems)
    for name in ("sent", "refused", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        one.log_folder(tmp_path / name, name)
    (sent,) = (tmp_path / "run/mlflow").glob("sent.*/")
    shutil.rmtree(sent)  # the process ended before it could note that
    assert one.close("FINISHED", 60) == 0
    assert ["kind folder, dropped" in problem for problem in problems] == [True]
    assert [file.path for file in mlflow.MlflowClient(uri).list_artifacts(str(one.run_id))] == ["good"]
    assert not [path for path in (tmp_path / "run/mlflow").iterdir() if path.is_dir()]


def make_a_run(uri: str, together: Barrier) -> None:
    together.wait()
    run = MlflowRun(Target(uri, "new", "/runs/one", uuid.uuid4().hex))
    run.send([metric(1, 0.5)])


def test_a_new_database_is_made_without_a_word(tmp_path: Path) -> None:
    code = "import sys; from pipeline.tracking.mlflow_store import open_client; open_client(sys.argv[1])"
    made = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"], capture_output=True, text=True, check=True
    )
    assert (made.stdout, made.stderr) == ("", "")
    assert (tmp_path / "mlflow.db").stat().st_size > 0


def test_processes_that_make_one_store_at_once_do_not_break_it(tmp_path: Path) -> None:
    """A sweep in a fresh storage: MLflow's own migrations ran into each other, and left half of the tables.

    The store's folder is not there yet: MLflow makes that, too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.tracking.mlflow_run", "mlflow.store.tracking.sqlalchemy_store"])
    together = context.Barrier(4)
    uri = f"sqlite:///{tmp_path}/new/folder/mlflow.db"
    processes = [context.Process(target=make_a_run, args=(uri, together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("new")
    assert experiment is not None
    assert [run.data.metrics for run in client.search_runs([experiment.experiment_id])] == [{"loss": 0.5}] * 4


@pytest.fixture
def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path, port: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Filled by the test with the MLflow server that it starts; stopped at the end."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.terminate()
        process.wait(30)


@pytest.mark.e2e
def test_a_server_that_comes_late_gets_everything(
    tmp_path: Path, port: int, server: list[subprocess.Popen[bytes]]
) -> None:
    """Nobody listens at first: logging does not wait, and all is there once a real server answers."""
    problems: list[str] = []
    uri = f"http://127.0.0.1:{port}"
    late = logger(uri, tmp_path / "run", problems)
    started = time.perf_counter()
    for step in range(1000):
        late.log_metrics(step, {"loss": float(step)})
    assert time.perf_counter() - started < 2
    assert late.close("KILLED", 3) > 1000
    assert len(problems) == 1
    assert f"MLflow at {uri} fails, records wait in" in problems[0]
    waiting = (tmp_path / "run" / "mlflow" / "outbox.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in waiting].count("metrics") == 1000

    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    with (tmp_path / "server.log").open("wb") as log:
        server.append(subprocess.Popen(command, stdout=log, stderr=log))
    again = logger(uri, tmp_path / "run")
    again.log_text("hello", "note.txt")
    assert again.close("FINISHED", 120) == 0
    client = mlflow.MlflowClient(uri)
    history = [(m.step, m.value) for m in client.get_metric_history(str(again.run_id), "loss")]
    assert history == [(step, float(step)) for step in range(1000)]
    assert [a.path for a in client.list_artifacts(str(again.run_id))] == ["note.txt"]
