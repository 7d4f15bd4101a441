"""MLflow, off the training's path.

What is to be logged is appended to an outbox, a file in the run's directory, and training goes on. A
thread sends the outbox's records to MLflow, in order, and notes how far it came. A server that is away
therefore costs nothing but time: records wait, for this process, the next one that resumes the run, or
`pipeline sync`.
"""

import errno
import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.running import MlflowConfig
from pipeline.failures import MLFLOW_CALL_S, READ_CHECKPOINT_S, backoff, mlflow_refuses, retry
from pipeline.runs.claim import Claim, SupersededError
from pipeline.storage import Storage
from pipeline.tracking.backlog import Backlog
from pipeline.tracking.mlflow_run import ATTEMPT, REPORT, MlflowRun, ReportError, Target
from pipeline.tracking.mlflow_store import reason
from pipeline.tracking.outbox import Outbox, first_batch
from pipeline.tracking.records import End, Folder, Metrics, Model, Params, Record, Report, Staged, Start, Tags, Text
from pipeline.tracking.staging import Staging

if TYPE_CHECKING:  # the driver uses this module, and does without torch
    from pipeline.tracking.report.page import Facts

MAX_TAG = 500  # characters: what one looks at in MLflow's list of tags
MAX_METRICS = 1000  # in one request, MLflow's limit
CHECK_CLAIM_S = 5.0  # another driver takes longer to get to its first step, and to ask MLflow what it has
FOLDER = "mlflow"  # of the run, on this machine
TARGET = "target.json"


class MlflowLogger:
    """Logs one training to one MLflow run, through restarts and resumes.

    Args:
        folder: where the outbox lies.
        warn: called with a line for the user when MLflow cannot be reached or refuses a record.
        claim: to the run. An attempt that has lost it sends nothing more.

    Attributes:
        outbox: what MLflow has not got yet. staging: the folders of files among it.
    """

    def __init__(self, target: Target, folder: Path, warn: Callable[[str], None], claim: Claim | None = None):
        self._run: MlflowRun | None = None
        self.target, self._folder, self._warn = target, folder, warn
        self._claim, self._checked = claim, -math.inf
        self.outbox, self.staging = Outbox(folder, warn), Staging(folder)
        self._backlog: Backlog | None = None
        try:
            self.staging.remove_others(self.outbox.staged)
        except OSError as e:
            warn(f"{folder} cannot be read: {e}")
        (folder / TARGET).write_text(json.dumps(asdict(target)), encoding="utf-8")
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._failing, self._answered = False, time.monotonic()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)

    @classmethod
    def of_run(
        cls, cfg: MlflowConfig, run: Storage, training_id: str, warn: Callable[[str], None], claim: Claim | None = None
    ) -> "MlflowLogger":
        """For the training `training_id` in the folder `run`."""
        return cls(Target.of(cfg, run, training_id), run.local_dir / FOLDER, warn, claim)

    def connect(self) -> None:
        """Begin to send. Until then, or until the end, MLflow is not even imported: that takes a core for seconds."""
        if self._thread.ident is None:
            self._thread.start()

    def start(self) -> None:
        """Begin an attempt: the MLflow run is running, and this machine's system metrics are logged to it."""
        self._put(Start(ATTEMPT))

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None until MLflow was reached."""
        return self._run.id if self._run else None

    @property
    def experiment_id(self) -> str | None:
        return self._run.experiment_id if self._run else None

    def take_backlog(self, attempt: str) -> None:
        """Send what waited on the machine that had the run before, where that was another one.

        Args:
            attempt: see `Backlog`.

        Raises:
            OSError: the storage does not tell.
        """
        run = Storage(self.target.run)
        if not run.local:
            self._backlog = Backlog(run, self.outbox, self.target, attempt)
            self._backlog.adopt()

    def save_backlog(self) -> None:
        """Have what waits outlive this machine, where the run does.

        Raises:
            OSError: the storage does not take it.
        """
        if self._backlog is not None:
            self._backlog.save()

    def log_params(self, values: dict[str, Any]) -> None:
        """Log parameters; MLflow keeps the first value of each for good, and a later one is not sent."""
        self._put(Params({k: str(v) for k, v in values.items()}))

    def set_tags(self, values: dict[str, Any]) -> None:
        self._put(Tags({k: str(v)[:MAX_TAG] for k, v in values.items()}))

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self._put(Metrics(step, int(time.time() * 1000), values))

    def log_text(self, text: str, to: str) -> None:
        """Log `text` as the artifact file `to`."""
        self._put(Text(text, to))

    def log_folder(self, source: Path, to: str) -> None:
        """Log a directory's files below the artifact path `to`, as they are now.

        They are hard-linked aside until they are sent, so that `source` may be deleted meanwhile.

        Raises:
            OSError: that cannot be done.
        """
        self._put(Folder(self.staging.link(source), to))

    def log_report(self, facts: "Facts") -> None:
        """Make the report and log it, once all that was logged before has arrived; the facts wait on disk.

        Raises:
            OSError: they cannot be written there.
        """
        self._put(Report(self.staging.save(REPORT, facts.save)))

    def log_model(self, checkpoint: Storage, register: str | None) -> None:
        """Log a checkpoint's model as the run's model, also in the registry where a name is given."""
        self._put(Model(checkpoint.name, register))

    def close(
        self,
        status: str | None,
        timeout_s: float,
        limit_s: float = math.inf,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> int:
        """End the MLflow run and wait until all is sent.

        Args:
            status: FINISHED, KILLED (to be resumed) or FAILED; None: leave the run as it is.
            timeout_s: how long to go on trying an MLflow that fails; one that answers is waited for.
            limit_s: of the whole wait. heartbeat: called meanwhile.

        Returns:
            How many records still wait in the outbox.
        """
        if status is not None:
            self._put(End(status))
        self._closing.set()
        self._wake.set()
        self.connect()
        self._answered = time.monotonic()
        end, deadline = self._answered + limit_s, self._answered + timeout_s
        while self._thread.is_alive() and time.monotonic() < min(deadline, end):
            self._thread.join(0.1)
            heartbeat()
            if not self._failing and time.monotonic() < self._answered + MLFLOW_CALL_S:
                deadline = time.monotonic() + timeout_s
        self._abandoned.set()
        self._thread.join(1)
        waiting = len(retry(self.outbox.unsent, self._warn, READ_CHECKPOINT_S))
        try:
            self.save_backlog()
        except OSError as e:
            self._warn(f"{waiting} records for MLflow wait on this machine alone, in {self.outbox.path}: {e}")
        if not self._thread.is_alive():
            self.outbox.close()
        return waiting

    def abandon(self) -> None:
        """Send nothing more: the run is another driver's."""
        self._abandoned.set()
        self._wake.set()
        self.connect()
        self._thread.join(1)
        self._stop_monitor()
        if not self._thread.is_alive():
            self.outbox.close()

    def _stop_monitor(self) -> None:
        if self._run is not None:
            self._run.stop_monitor()

    def _put(self, record: Record) -> None:
        self.outbox.append(record)
        self._wake.set()

    def _send_all(self) -> None:
        """The thread: send what waits, retry what fails, until closed and empty."""
        pauses = backoff()
        while not self._abandoned.is_set():
            self._wake.clear()
            try:
                self._send_waiting()
            except SupersededError as e:
                self._warn(f"nothing more is sent to MLflow: {e}")
                self._stop_monitor()
                return
            except Exception as e:  # MLflow raises whatever its transport raises; none of it may end a training
                if not self._failing:
                    file = str(getattr(e, "filename", None) or "")
                    ours = [place for place in (str(self._folder), self.target.run) if file.startswith(place)]
                    what = f"{ours[0]} cannot be used" if ours else f"MLflow at {self.target.uri} fails"
                    self._warn(f"{what}, records wait in {self.outbox.path}: {reason(e)}")
                self._failing = True
                if self._closing.is_set():  # somebody waits
                    self._abandoned.wait(1)
                else:
                    self._closing.wait(next(pauses))
                continue
            self._failing, pauses = False, backoff()
            if self._closing.is_set() and not self.outbox.head():
                return
            self._wake.wait()

    def _send_waiting(self) -> None:
        if self._run is None:
            run = MlflowRun(self.target, follow=True, staging=self._folder)
            if self.outbox.is_new or self._backlog:  # perhaps another machine has sent some of it
                self.outbox.skip(run.last_steps())
            self._run = run
        waiting = self.outbox.head()
        while waiting and not self._abandoned.is_set():
            batch = first_batch(waiting, MAX_METRICS)
            first = batch[0][0]
            self.staging.use(first.staged if isinstance(first, Staged) else None)
            self._check_claim()
            try:
                self._run.send([record for record, _ in batch])
            except ReportError as e:
                self._warn(f"no report is made: {reason(e)}")
            except Exception as e:
                if not mlflow_refuses(e):
                    raise
                self._warn(f"MLflow refused a record of kind {type(first).__name__.lower()}, dropped: {reason(e)}")
                if isinstance(first, Staged):
                    shutil.rmtree(self._folder / first.staged, ignore_errors=True)
            self.staging.use(None)
            self._answered = time.monotonic()
            self.outbox.mark_sent(batch[-1][1])
            self._failing = False
            waiting = waiting[len(batch) :] or self.outbox.head()

    def _check_claim(self) -> None:
        if self._claim is None or time.monotonic() < self._checked + CHECK_CLAIM_S:
            return
        try:
            self._claim.check()
        except OSError as e:
            raise OSError(
                e.errno or errno.EIO, f"cannot check which driver owns the run: {e}", self.target.run
            ) from None
        self._checked = time.monotonic()
