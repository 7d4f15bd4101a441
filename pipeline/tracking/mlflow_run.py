"""The MLflow run of a training: finding or making it, and sending it records.

`mlflow_store`, this file, `system_metrics` and `registry` alone import `mlflow`; and `pyfunc_model`, which MLflow runs.
The driver uses this file too, and starts faster without torch: what imports that is imported late.
"""

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.running import MlflowConfig
from pipeline.environment import SQLITE
from pipeline.runs.spec import CHECKPOINTS
from pipeline.storage import Storage
from pipeline.tracking.mlflow_store import ARTIFACTS, follow_artifacts, is_missing, open_client, reason, tracking_uri
from pipeline.tracking.records import End, Folder, Metrics, Model, Params, Record, Report, Start, Tags, Text
from pipeline.tracking.report.charts import METRICS, History

TRAINING_ID_TAG = "pipeline.training_id"
RUN_TAG = "pipeline.run_dir"
REPORT = "report"  # its folder of artifacts
ATTEMPT = uuid.uuid4().hex  # this process: an attempt's start that is sent by a later one is past


class ReportError(RuntimeError):
    """A report that cannot be made, however often it is tried."""


@dataclass(frozen=True)
class Target:
    """The MLflow run that an outbox is for; kept beside it, so that an outbox can be sent without its training.

    uri: of the MLflow store. run: path or URI of the run's folder. training_id: finds the same MLflow run again.
    """

    uri: str
    experiment: str
    run: str
    training_id: str

    @classmethod
    def of(cls, cfg: MlflowConfig, run: Storage, training_id: str, uri: str | None = None) -> "Target":
        """For a training in the folder `run`; uri: of another store than the configured one."""
        return cls(tracking_uri(uri or cfg.uri, run.parent), cfg.experiment, run.uri, training_id)


class MlflowRun:
    """Connects to the store, and finds or makes the run.

    Args:
        follow: whether a SQLite store that was moved is told where its artifacts lie now; not by who only reads it,
            perhaps on another machine, where the same folder has another path.
        staging: where the folders lie that records name.

    Raises (here and in `send`):
        Exception: MLflow raises whatever its transport raises.
    """

    def __init__(self, target: Target, *, follow: bool = False, staging: Path = Path()):
        self._uri, self._folder, self._follows, self._staging = target.uri, target.run, follow, staging
        self._monitor: Any = None
        self._client = open_client(target.uri)
        self.experiment_id = self._experiment(target.experiment)
        known_id = _search(self._client, self.experiment_id, target.training_id)
        self.is_new = known_id is None
        if known_id is None:
            tags = {TRAINING_ID_TAG: target.training_id, RUN_TAG: target.run}
            run = self._client.create_run(self.experiment_id, run_name=Storage(target.run).name, tags=tags)
            known_id = str(run.info.run_id)
        self.id = known_id

    def _experiment(self, name: str) -> str:
        # A SQLite store is a file of ours: keep the artifacts beside it. A server knows its own place.
        database = self._uri.removeprefix(SQLITE)
        beside = str(Path(database).parent / ARTIFACTS) if database != self._uri else None
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            if beside is not None and self._follows:
                follow_artifacts(Path(database), experiment.artifact_location, beside)
            return str(experiment.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=beside))
        except Exception:  # another process may have just made it
            if (made := self._client.get_experiment_by_name(name)) is None:
                raise
            return str(made.experiment_id)

    def last_steps(self) -> dict[str, int]:
        """The highest step of each metric."""
        # As MLflow's own monitor of the system does: the history of a week has millions of points.
        return {m.key: m.step for m in self._client.get_run(self.id).data._metric_objs}

    def history(self) -> History:
        """What the report draws."""
        known = self._client.get_run(self.id).data.metrics
        series = {key: self._client.get_metric_history(self.id, key) for key in METRICS if key in known}
        return {key: sorted((m.step, m.value) for m in points) for key, points in series.items()}

    def log_report(self, files: Iterable[Path]) -> None:
        """In the place of the one there is, if so."""
        for file in files:
            self._client.log_artifact(self.id, str(file), REPORT)

    def send(self, records: Sequence[Record]) -> None:
        """Log several records of metrics, or one of another kind. A record that was sent before changes nothing."""
        from mlflow.entities import Metric, Param, RunTag

        client = self._client
        match records[0]:
            case Metrics():
                metrics = [r for r in records if isinstance(r, Metrics)]
                values = [Metric(k, v, r.time, r.step) for r in metrics for k, v in r.values.items()]
                client.log_batch(self.id, metrics=values)
            case Params(values):
                known = client.get_run(self.id).data.params
                client.log_batch(self.id, params=[Param(k, v) for k, v in values.items() if k not in known])
            case Tags(values):
                client.log_batch(self.id, tags=[RunTag(k, v) for k, v in values.items()])
            case Text(text, to):
                client.log_text(self.id, text, to)
            case Folder(staged, to):
                if (self._staging / staged).exists():  # else it was sent, or has given way on a full disk
                    client.log_artifacts(self.id, str(self._staging / staged), to)
                    shutil.rmtree(self._staging / staged)
            case Model(checkpoint, register):
                self.log_model(checkpoint, register)
            case Report(staged):
                self._report(self._staging / staged)
            case Start(attempt):
                client.update_run(self.id, status="RUNNING")
                client.set_tag(self.id, RUN_TAG, self._folder)  # it may lie elsewhere now
                if attempt == ATTEMPT and self._monitor is None:  # else it is sent once more
                    from pipeline.tracking.system_metrics import Monitor

                    self._monitor = Monitor(self.id, resume_logging=True, tracking_uri=self._uri)
                    self._monitor.start()
            case End(status):
                self.stop_monitor()
                client.set_terminated(self.id, status)

    def log_model(self, checkpoint: str, register: str | None) -> int | None:
        """Log the model of the run's checkpoint of this name; the version that it has in the registry, if it is to."""
        from pipeline.tracking.registry import ModelRegistry

        registry = ModelRegistry(self._client, self._uri, self.experiment_id, self.id)
        place = Storage(self._folder) / CHECKPOINTS / checkpoint
        model_id = registry.log(place)
        return None if register is None else registry.register(model_id, register, place, {RUN_TAG: self._folder})

    def _report(self, source: Path) -> None:
        """Make the report of facts that were laid aside, now that all metrics before it have arrived."""
        from pipeline.tracking.report.page import Facts, write_report

        if not source.exists():  # it was logged, and the process ended just then
            return
        history, out = self.history(), source / REPORT
        try:
            names = write_report(Facts.load(source), history, out)
        except Exception as e:  # whatever drawing raises: trying again would not help, and no training may end by it
            shutil.rmtree(source)
            raise ReportError(f"{type(e).__name__}: {e}") from e
        self.log_report(out / name for name in names)
        shutil.rmtree(source)

    def stop_monitor(self) -> None:
        """Log no more of this node's CPU, memory, disk, network and GPUs."""
        if self._monitor is not None:
            self._monitor.finish()


def _search(client: Any, experiment_id: str, training_id: str) -> str | None:
    """The id of a training's run."""
    runs = client.search_runs([experiment_id], f"tags.`{TRAINING_ID_TAG}` = '{training_id}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def open_existing(target: Target, *, follow: bool = False) -> MlflowRun | None:
    """A training's run, or None where the store has none; nothing is made.

    Args:
        follow: see `MlflowRun`; for who writes to it.

    Raises:
        Exception: MLflow raises whatever its transport raises.
    """
    if is_missing(target.uri):
        return None
    client = open_client(target.uri)
    experiment = client.get_experiment_by_name(target.experiment)
    known = experiment is not None and _search(client, experiment.experiment_id, target.training_id) is not None
    return MlflowRun(target, follow=follow) if known else None


def find_run(uri: str, run_id: str) -> Storage | None:
    """The folder of the run with this MLflow id, or None where the store has no such run.

    Raises:
        ConnectionError: the store does not answer, or asks for a login.
    """
    from mlflow import MlflowException

    if is_missing(uri):
        return None
    try:
        return Storage(open_client(uri).get_run(run_id).data.tags[RUN_TAG])
    except KeyError:
        return None
    except MlflowException as e:
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise ConnectionError(f"MLflow at {uri} cannot be asked for run {run_id}: {reason(e)}") from None


def fetch_checkpoints(uri: str, run_id: str, to: Path) -> Iterator[Path]:
    """The checkpoints among a run's artifacts, newest first, each fetched into `to` when it is asked for.

    Raises:
        ConnectionError: the store does not give them.
    """
    from mlflow import MlflowException

    client = open_client(uri)
    try:
        folders = [artifact.path for artifact in client.list_artifacts(run_id, CHECKPOINTS) if artifact.is_dir]
        for path in sorted(folders, reverse=True):
            yield Path(client.download_artifacts(run_id, path, str(to)))
    except (MlflowException, OSError) as e:
        raise ConnectionError(f"MLflow at {uri} does not give the checkpoints of run {run_id}: {reason(e)}") from None


def register(target: Target, checkpoint: str, name: str) -> int:
    """Log the model of a training's checkpoint to its MLflow run, as far as it is not there, and register it.

    Returns:
        The version of the registered model `name`.

    Raises:
        ConnectionError: MLflow does not answer, or refuses it.
        CheckpointError: the checkpoint is damaged.
    """
    from mlflow import MlflowException

    try:
        run = MlflowRun(target, follow=True)
        if run.is_new:  # of a training that was logged elsewhere; nothing else would end it
            open_client(target.uri).set_terminated(run.id)
        version = run.log_model(checkpoint, name)
    except (MlflowException, OSError) as e:
        raise ConnectionError(f"MLflow at {target.uri} does not take the model: {reason(e)}") from None
    assert version is not None, "it has a name"
    return version


def try_out(uri: str, experiment: str) -> None:
    """Make a run with a metric in the experiment, read it back, and delete it.

    Raises:
        Exception: MLflow raises whatever its transport raises.
    """
    run = MlflowRun(Target(uri, experiment, "doctor", uuid.uuid4().hex))
    try:
        run.send([Metrics(1, 0, {"doctor": 1.0})])
        if run.last_steps() != {"doctor": 1}:
            raise OSError("what was written does not come back")
    finally:
        open_client(uri).delete_run(run.id)
