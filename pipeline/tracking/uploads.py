"""What goes to MLflow as artifacts; where it cannot be read, that is told, and training goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.loading.loader import EvalLoader
from pipeline.failures import CheckpointError, retry
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import META, Checkpoint
from pipeline.runs.spec import CHECKPOINTS
from pipeline.storage import Storage
from pipeline.tracking.metrics import Predictions
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.tracking.report.page import Facts, find_mistakes

MAX_WAITING = 8  # checkpoints of one run, for an MLflow that is away or slow


class Uploads:
    """Hands folders to the logger, which takes them aside and sends them.

    Args:
        warn: called with a line for the user. timeout_s: how long a storage that does not answer is waited for.
    """

    def __init__(self, logger: MlflowLogger, warn: Callable[[str], None], timeout_s: float):
        self._logger, self._warn, self._timeout_s = logger, warn, timeout_s
        self._num_dropped = 0

    def folder(self, folder: Path) -> None:
        """A folder's files, below its name."""
        self._hand_over(folder, lambda: self._logger.log_folder(folder, folder.name))

    def checkpoint(self, saved: Checkpoint) -> None:
        def log() -> None:
            if not (saved.path / META).exists():  # of an object store only what was written last is here, and whole
                checkpoint.load(saved.place, use_copy=True)
            self._logger.log_folder(saved.path, f"{CHECKPOINTS}/{saved.path.name}")

        self._hand_over(saved.place, log)
        try:
            self._drop_oldest()
        except OSError as e:
            self._warn(f"checkpoints that wait for MLflow cannot be deleted: {e}")

    def _drop_oldest(self) -> None:
        """So that no more than `MAX_WAITING` wait."""
        while self._logger.staging.num_checkpoints() > MAX_WAITING and (dropped := self._logger.staging.drop_oldest()):
            self._num_dropped += 1
            if self._num_dropped.bit_count() == 1:  # the 1st, 2nd, 4th, ...
                self._warn(
                    f"MLflow does not take checkpoints as fast as they come, and no more than {MAX_WAITING} wait: "
                    f"{dropped} is left out, {self._num_dropped} of this attempt's so far"
                )

    def report(
        self, cfg: Config, run: Storage, meta: dict[str, Any], predictions: Predictions, val_loader: EvalLoader
    ) -> None:
        """All that the report takes, laid aside, so that MLflow may be away: the thread that logs it makes it."""
        try:
            mistakes = find_mistakes(predictions, val_loader)
            self._logger.log_report(Facts(run.name, cfg.data.val, meta, cfg, predictions, mistakes))
        except Exception as e:  # a full disk, images that cannot be read again, ...: the training is done all the same
            self._warn(f"no report is made ({type(e).__name__}: {e}); try again: pipeline report {run}")

    def _hand_over(self, source: Path | Storage, log: Callable[[], None]) -> None:
        try:
            retry(log, self._warn, self._timeout_s)
        except (OSError, CheckpointError) as e:
            self._warn(f"{source} is not uploaded to MLflow: {e}")
