"""MLflow, off the training's path. The only file that imports `mlflow`.

What is to be logged is appended to a spool, a file in the run's directory, and training goes on. A
thread sends the spool's records to MLflow, in order, and notes how far it came. A server that is away
therefore costs nothing but time: records wait, in this process or the next one that resumes the run.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.config import MlflowConfig
from pipeline.spool import Record, Spool

MAX_METRICS = 1000  # in one request, MLflow's limit
RETRY_SECONDS = (1, 2, 5, 10, 30)
TRAINING_ID_TAG = "pipeline.training_id"
RUN_DIR_TAG = "pipeline.run_dir"
MODEL_TAG = "pipeline.model_from"  # the checkpoint whose model is logged


def tracking_uri(configured: str | None, storage: Path) -> str:
    """Where runs are logged: as configured, else $MLFLOW_TRACKING_URI, else a SQLite file in `storage`."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute() / 'mlflow.db'}"


class Tracker:
    """Logs one training to one MLflow run, through restarts and resumes.

    Args:
        uri: of the MLflow store.
        run_dir: the run's directory, whose name is shown in MLflow; the spool lies below it.
        training_id: finds the same MLflow run again.
        on_problem: called with a line for the user when MLflow cannot be reached or refuses a record.
    """

    def __init__(
        self,
        cfg: MlflowConfig,
        uri: str,
        run_dir: Path,
        *,
        training_id: str,
        on_problem: Callable[[str], None],
    ):
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._cfg, self._uri, self._run_dir = cfg, uri, run_dir
        self._training_id, self._on_problem = training_id, on_problem
        self._spool = Spool(run_dir / "mlflow", on_problem)
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._failing = False
        self._monitor: Any = None
        self._put({"kind": "start"})
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def spool(self) -> Path:
        """The file of what MLflow has not got yet."""
        return self._spool.path

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; MLflow keeps the first value of each for good, and a later one is not sent."""
        self._put({"kind": "params", "values": {k: str(v) for k, v in values.items()}})

    def tags(self, values: dict[str, Any]) -> None:
        self._put({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._put({"kind": "metrics", "step": step, "time": int(time.time() * 1000), "values": values})

    def text(self, text: str, to: str) -> None:
        """Log `text` as the artifact file `to`."""
        self._put({"kind": "text", "text": text, "to": to})

    def folder(self, source: Path, to: str) -> None:
        """Log a directory's files below the artifact path `to`, as they are now.

        They are hard-linked aside until they are sent, so that `source` may be deleted meanwhile.
        """
        aside = self._run_dir / "mlflow" / f"{source.name}.{time.time_ns()}"
        try:
            shutil.copytree(source, aside, copy_function=os.link)
        except shutil.Error:  # a file system without hard links
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source, aside)
        self._put({"kind": "folder", "source": str(aside), "to": to})

    def model(self, source: Path) -> None:
        """Log the model of the checkpoint `source`, with its signature, as the run's model."""
        self._put({"kind": "model", "source": str(source)})

    def close(self, status: str, patience_s: float) -> int:
        """End the MLflow run and wait until all is sent.

        Args:
            status: FINISHED, KILLED (to be resumed) or FAILED.
            patience_s: how long to go on trying an MLflow that fails; one that answers is waited for.

        Returns:
            How many records still wait in the spool.
        """
        self._put({"kind": "end", "status": status})
        self._closing.set()
        self._wake.set()
        deadline = time.monotonic() + patience_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.1)
            if not self._failing:
                deadline = time.monotonic() + patience_s
        self._abandoned.set()
        self._thread.join(1)
        waiting = len(self._spool.unsent())
        if not self._thread.is_alive():
            self._spool.close()
        return waiting

    def _put(self, record: Record) -> None:
        self._spool.append(record)
        self._wake.set()

    def _send_all(self) -> None:
        """The thread: send what waits, retry what fails, until closed and empty."""
        failures, client = 0, None
        while not self._abandoned.is_set():
            self._wake.clear()
            try:
                client = client or self._connect()
                self._send_waiting(client)
            except Exception as e:  # MLflow raises whatever its transport raises; none of it may end a training
                if not self._failing:
                    self._on_problem(f"MLflow at {self._uri} fails, records wait in {self.spool}: {_first_line(e)}")
                self._failing = True
                self._abandoned.wait(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
                failures += 1
                continue
            self._failing, failures = False, 0
            if self._closing.is_set() and not self._spool.unsent():
                return
            self._wake.wait()

    def _connect(self) -> Any:
        # MLflow's own retries (7, of up to 120 s each) would hide for minutes that a server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow

        client = mlflow.MlflowClient(self._uri)
        experiment = client.get_experiment_by_name(self._cfg.experiment)
        if experiment is None:
            # A SQLite store is a file of ours: keep the artifacts beside it. A server knows its own place.
            database = self._uri.removeprefix("sqlite:///")
            beside = str(Path(database).parent / "mlartifacts") if database != self._uri else None
            self.experiment_id = client.create_experiment(self._cfg.experiment, artifact_location=beside)
        else:
            self.experiment_id = experiment.experiment_id
        found = client.search_runs(
            [self.experiment_id], f"tags.`{TRAINING_ID_TAG}` = '{self._training_id}'", max_results=1
        )
        if found:
            self.run_id = found[0].info.run_id
        else:
            tags = {TRAINING_ID_TAG: self._training_id, RUN_DIR_TAG: str(self._run_dir)}
            self.run_id = client.create_run(self.experiment_id, run_name=self._run_dir.name, tags=tags).info.run_id
        return client

    def _send_waiting(self, client: Any) -> None:
        from mlflow.exceptions import MlflowException

        waiting = self._spool.unsent()
        while waiting:
            batch = _leading_metrics(waiting) or waiting[:1]
            try:
                self._send(client, [record for record, _ in batch])
            except (MlflowException, OSError, checkpoint.CheckpointError) as e:
                if not _is_final(e):
                    raise
                self._on_problem(f"MLflow refused a record of kind {batch[0][0]['kind']}, dropped: {_first_line(e)}")
            self._spool.mark_sent(batch[-1][1])
            waiting = waiting[len(batch) :] or self._spool.unsent()

    def _send(self, client: Any, records: list[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        record = records[0]
        match record["kind"]:
            case "metrics":
                metrics = [Metric(k, v, r["time"], r["step"]) for r in records for k, v in r["values"].items()]
                client.log_batch(self.run_id, metrics=metrics)
            case "params":
                known = client.get_run(self.run_id).data.params
                client.log_batch(
                    self.run_id, params=[Param(k, v) for k, v in record["values"].items() if k not in known]
                )
            case "tags":
                client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in record["values"].items()])
            case "text":
                client.log_text(self.run_id, record["text"], record["to"])
            case "folder":
                client.log_artifacts(self.run_id, record["source"], record["to"])
                shutil.rmtree(record["source"])
            case "model":
                source = Path(record["source"])
                if client.get_run(self.run_id).data.tags.get(MODEL_TAG) != source.name:  # a finished run, run again
                    _log_model(self._uri, self.run_id, source)
                    client.set_tag(self.run_id, MODEL_TAG, source.name)
            case "start":
                client.update_run(self.run_id, status="RUNNING")
                # CPU, memory, disk, network and GPUs of this node.
                self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self._uri)
                self._monitor.start()
            case "end":
                if self._monitor is not None:  # its start may have been sent by an earlier session
                    self._monitor.finish()
                client.set_terminated(self.run_id, record["status"])


def find_run_dir(uri: str, run_id: str) -> Path | None:
    """The directory of the run with this MLflow id, or None where the store has no such run."""
    import mlflow

    try:
        return Path(mlflow.MlflowClient(uri).get_run(run_id).data.tags[RUN_DIR_TAG])
    except (mlflow.MlflowException, KeyError):
        return None


def _log_model(uri: str, run_id: str | None, source: Path) -> None:
    """Log a checkpoint's model as an exported graph (pt2): loading it runs no pickled code."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model, cfg, classes = checkpoint.load_model(source)
    size = cfg.data.image_size
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, 3, size, size))]),
        Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))]),
    )
    mlflow.set_tracking_uri(uri)  # for the process: there is no log_model on a client
    with mlflow.start_run(run_id=run_id):
        mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            input_example=np.zeros((2, 3, size, size), dtype=np.uint8),  # two: a batch of one would fix the size
            pip_requirements=["torch", "numpy"],
            metadata={"classes": list(classes), "checkpoint": source.name},
            serialization_format="pt2",
        )


def _leading_metrics(waiting: list[tuple[Record, int]]) -> list[tuple[Record, int]]:
    """The metrics records at the head of the queue that fit one request."""
    batch, size = [], 0
    for record, end in waiting:
        size += len(record.get("values", ()))
        if record["kind"] != "metrics" or size > MAX_METRICS:
            break
        batch.append((record, end))
    return batch


def _is_final(error: Exception) -> bool:
    """Whether sending the same record again must fail again."""
    if isinstance(error, (FileNotFoundError, checkpoint.CheckpointError)):
        return True
    return getattr(error, "error_code", None) in {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
