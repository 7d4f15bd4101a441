"""`pipeline sync`: what waits for MLflow goes to the store of its run, wherever both are now."""

import dataclasses
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from s3 import s3_storage

from pipeline.config.running import MlflowConfig
from pipeline.errors import UserError
from pipeline.runs.claim import Claim
from pipeline.runs.manifest import RunManifest
from pipeline.storage import Storage
from pipeline.tracking.backlog import FOLDER, Backlog
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.tracking.mlflow_run import MlflowRun, Target, open_existing
from pipeline.tracking.mlflow_store import moved_config, store_beside, tracking_uri
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.records import Record
from pipeline.tracking.sync import _moved, sync


def leave_waiting(run: Storage, uri: str, monkeypatch: pytest.MonkeyPatch, *steps: int, folder: Path) -> None:
    """An attempt that logs these steps, and a folder, and has no MLflow; it tells of its end if run.json says so."""
    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "__init__", lambda *_, **__: 1 / 0)
        one = MlflowLogger(Target(uri, "pipeline", run.uri, "id"), run.local_dir / "mlflow", lambda _: None)
        one.take_backlog("-00000001")
        one.start()
        for step in steps:
            one.log_metrics(step, {"loss": 10.0 * step})
        folder.mkdir()
        (folder / "state.pt").write_text("weights")
        one.log_folder(folder, "checkpoints/step_1")
        shutil.rmtree(folder)
        assert one.close("KILLED", 0) > 0


def logged(uri: str) -> tuple[list[int], list[str]]:
    """The steps of the only run's loss, and the paths of its artifacts."""
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    files = [one.path for one in client.list_artifacts(run.info.run_id, "checkpoints/step_1")]
    return [m.step for m in client.get_metric_history(run.info.run_id, "loss")], files


def test_what_waits_moves_with_its_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store beside the run, the folders that wait, and the address of both."""
    old, new = Storage(tmp_path / "old"), Storage(tmp_path / "new")
    leave_waiting(old / "run", tracking_uri(None, old), monkeypatch, 1, 2, folder=tmp_path / "step_1")
    RunManifest(training_id="id").begin(0).end().write(old / "run")
    (tmp_path / "old").rename(tmp_path / "new")
    target, _, waiting = sync(new / "run", pytest.fail)
    assert (target.uri, target.run, waiting) == (store_beside(new), str(new / "run"), 0)
    assert not (tmp_path / "old").exists()
    assert logged(target.uri) == ([1, 2], ["checkpoints/step_1/state.pt"])


def test_what_waits_of_a_lost_machine_is_sent_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_scratch: Callable[[str], None]
) -> None:
    """But for files, which were there alone."""
    uri = tracking_uri(None, Storage(tmp_path))
    with s3_storage() as bucket:
        run = bucket / "run"
        tmp_scratch("first")
        leave_waiting(run, uri, monkeypatch, 1, 2, folder=tmp_path / "step_1")
        ended = RunManifest(training_id="id").begin(0)
        ended.write(run)
        tmp_scratch("second")
        with pytest.raises(UserError, match="may still be in training"):
            sync(run, pytest.fail)
        ended.end().write(run)
        assert sync(run, pytest.fail)[2] == 0
        assert logged(uri) == ([1, 2], [])
        client = mlflow.MlflowClient(uri)
        (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert found.info.status == "KILLED", "its start and its end have arrived"
        assert len((run / FOLDER).names()) == 1
        tmp_scratch("first")
        with monkeypatch.context() as patch:
            patch.setattr(RunManifest, "read", lambda *_: ended)
            with pytest.raises(UserError, match="may still be in training"):
                sync(run, pytest.fail)  # its outbox is not the newest any more
        tmp_scratch("third")
        assert sync(run, pytest.fail)[2] == 0, "nothing waits any more"
        assert logged(uri) == ([1, 2], [])


@pytest.fixture
def tmp_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this another machine: one whose temporary folder is its own."""

    def move(machine: str) -> None:
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / machine))

    return move


def test_what_a_full_disk_kept_from_the_outbox_is_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_scratch: Callable[[str], None]
) -> None:
    """The same machine comes back, and its outbox's file has less."""
    uri, full = tracking_uri(None, Storage(tmp_path)), [b""]
    with s3_storage() as bucket:
        tmp_scratch("machine")
        run, problems = bucket / "run", list[str]()
        with monkeypatch.context() as patch:
            patch.setattr(MlflowRun, "__init__", lambda *_, **__: 1 / 0)
            one = MlflowLogger(Target(uri, "pipeline", run.uri, "id"), run.local_dir / "mlflow", problems.append)
            one.take_backlog("-00000001")
            one.log_metrics(1, {"loss": 10.0})
            patch.setattr(one.outbox, "_write", full.clear)
            one.log_metrics(2, {"loss": 20.0})
            one.save_backlog()
            one.close(None, 0)
        one = MlflowLogger(Target(uri, "pipeline", run.uri, "id"), run.local_dir / "mlflow", problems.append)
        one.take_backlog("-00000002")
        one.log_metrics(3, {"loss": 30.0})
        assert one.close(None, 60) == 0
        assert logged(uri)[0] == [1, 2, 3]


def test_a_login_that_may_not_delete_keeps_its_backlog_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Storage, "delete", refused)
    with s3_storage() as bucket:
        for attempt in ("-00000001", "-00000002"):
            outbox = Outbox(tmp_path / attempt, pytest.fail)
            Backlog(bucket / "run", outbox, Target("", "", "", ""), attempt).adopt()
            outbox.close()
        assert (bucket / "run" / FOLDER).names() == ["-00000001", "-00000002"]


def test_a_run_that_was_moved_alone_is_logged_where_it_was(tmp_path: Path) -> None:
    old, new = Storage(tmp_path / "old"), Storage(tmp_path / "new")
    one = Target(store_beside(old), "pipeline", str(old / "run"), "id")
    assert _moved(one, new / "run").uri == store_beside(new), "the store went with it"
    (tmp_path / "old").mkdir()
    (tmp_path / "old/mlflow.db").touch()
    assert _moved(one, new / "run").uri == store_beside(old)


@pytest.mark.parametrize("inside", ["mlflow.db", "stores/all.db"])
def test_the_address_of_a_store_moves_with_the_storage_that_it_lies_in(tmp_path: Path, inside: str) -> None:
    old, new = Storage(tmp_path / "old"), Storage(tmp_path / "new")
    cfg = MlflowConfig(uri=f"sqlite:///{old}/{inside}")
    moved = f"sqlite:///{new}/{inside}"
    assert moved_config(cfg, old.uri, new).uri == moved, "the old one is gone"
    for folder in (old, new):
        (Path(folder.uri) / inside).parent.mkdir(parents=True)
    (Path(old.uri) / inside).touch()
    assert moved_config(cfg, old.uri, new).uri == cfg.uri, "the run alone was moved"
    (Path(new.uri) / inside).touch()
    assert moved_config(cfg, old.uri, new).uri == moved, "it was copied with its store"
    for other in (None, f"sqlite:///{tmp_path}/other.db", "http://host:5000", f"sqlite:///{old}er/x.db"):
        assert moved_config(MlflowConfig(uri=other), old.uri, new).uri == other
    assert moved_config(cfg, "s3://bucket/runs", new).uri == cfg.uri


def log_from(run: Path, checkpoint: Path) -> None:
    """A checkpoint among the artifacts of a run, whose store is beside its folder."""
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_text("weights")
    one = MlflowLogger(Target(store_beside(Storage(run.parent)), "pipeline", str(run), "id"), run / "mlflow", print)
    one.log_folder(checkpoint, "checkpoints/step_1")
    assert one.close("FINISHED", 60) == 0


def write_into(storage: Path) -> None:
    """A report, as `pipeline report` logs it."""
    target = Target(store_beside(Storage(storage)), "pipeline", str(storage / "run"), "id")
    run = open_existing(target, follow=True)
    assert run is not None
    (storage / "report.html").write_text("report")
    run.log_report([storage / "report.html"])


def test_what_is_logged_after_a_move_goes_to_where_the_storage_is_now(tmp_path: Path) -> None:
    """Each in a process of its own: MLflow remembers where a run's artifacts are."""
    old, new = tmp_path / "old", tmp_path / "new"
    for function, args in ((log_from, (old / "run", tmp_path / "step_1")), (write_into, (new,))):
        child = multiprocessing.get_context("spawn").Process(target=function, args=args)
        child.start()
        child.join(120)
        assert child.exitcode == 0
        if function is log_from:
            old.rename(new)
    assert not old.exists()
    assert {path.name for path in (new / "mlartifacts").rglob("*.*")} == {"state.pt", "report.html"}


def test_a_training_that_begins_meanwhile_sends_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_logger.CHECK_CLAIM_S", 0.0)
    run, send, problems = Storage(tmp_path / "run"), MlflowRun.send, list[str]()
    run.make()
    Claim.take(run)
    leave_waiting(run, tracking_uri(None, Storage(tmp_path)), monkeypatch, 1, 2, folder=tmp_path / "step_1")
    RunManifest(training_id="id").begin(0).end().write(run)

    def begins(self: MlflowRun, records: list[Record]) -> None:
        send(self, records)
        Claim.take(run)

    monkeypatch.setattr(MlflowRun, "send", begins)
    assert sync(run, problems.append)[2] > 0
    assert problems == [f"nothing more is sent to MLflow: another driver has begun to train {run}; this one ends"]


def test_a_driver_that_was_superseded_sends_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor trains the same steps, and asks MLflow for the last one as it begins."""
    monkeypatch.setattr("pipeline.tracking.mlflow_logger.CHECK_CLAIM_S", 0.0)
    run, uri, problems = Storage(tmp_path / "run"), tracking_uri(None, Storage(tmp_path)), list[str]()
    run.make()
    claim = Claim.take(run)
    one = MlflowLogger(Target(uri, "pipeline", run.uri, "id"), run.local_dir / "mlflow", problems.append, claim)
    one.log_metrics(1, {"loss": 1.0})
    assert one.close(None, 60) == 0
    one = MlflowLogger(Target(uri, "pipeline", run.uri, "id"), run.local_dir / "mlflow", problems.append, claim)
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "check", lambda _: (_ for _ in ()).throw(OSError("away")))
        one.log_metrics(2, {"loss": 2.0})
        assert one.close(None, 0.5) == 1, "it waits until it is known whose run it is"
    assert [problem.partition(",")[0] for problem in problems] == [f"{run} cannot be used"]
    one = MlflowLogger(Target(uri, "pipeline", run.uri, "id"), run.local_dir / "mlflow", problems.append, claim)
    Claim.take(run)
    monkeypatch.setattr(MlflowRun, "stop_monitor", lambda _: problems.append("nor of this node's CPU"))
    one.log_metrics(3, {"loss": 3.0})
    assert one.close(None, 60) == 2
    nothing = f"nothing more is sent to MLflow: another driver has begun to train {run}; this one ends"
    assert problems[1:] == [nothing, "nor of this node's CPU"]
    assert [m.step for m in mlflow.MlflowClient(uri).get_metric_history(str(one.run_id), "loss")] == [1]


def test_a_moved_run_says_so_to_whom_it_is_for(tmp_path: Path) -> None:
    """A server's address is no place of ours: it stays."""
    old = Target("http://mlflow:5000", "pipeline", str(tmp_path / "old/run"), "id")
    assert _moved(old, Storage(tmp_path / "new/run")) == dataclasses.replace(old, run=str(tmp_path / "new/run"))
