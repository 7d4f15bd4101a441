"""How a training has ended, written into run.json and MLflow from outside of it: its workers may be dead."""

import threading
from collections.abc import Callable

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.failures import DRIVER_END_S, MLFLOW_HANDOVER_S, Interrupted, TrainingFailedError
from pipeline.runs.claim import Claim
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage


def tell_end(
    spec: RunSpec, attempts: int, error: TrainingFailedError | Interrupted, warn: Callable[[str], None]
) -> None:
    """Tell it, for `DRIVER_END_S` at the most: the storage may be away, or hang.

    Args:
        attempts: that the run had had before the command; what became of these is not this one's to tell.
    """

    def tell() -> None:
        try:
            _tell_end(spec, attempts, error)
        except (OSError, RuntimeError, UserError) as e:
            warn(f"run.json and MLflow are not told: {e}")

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(DRIVER_END_S)


def tell_of_lost_driver(
    cfg: Config, place: str, command: str, error: TrainingFailedError, warn: Callable[[str], None]
) -> None:
    """The same, where no driver is left that could.

    Args:
        place: path or URI of the run's folder. command: see `Claim.take`; it had trained.
    """
    run = Storage(place)
    try:
        claim = Claim.last(run)
    except OSError as e:
        warn(f"run.json and MLflow are not told: {e}")
        return
    if claim is not None and claim.is_of(command):
        tell_end(RunSpec(cfg, run, "", "", claim=claim), 0, error, warn)


def _tell_end(spec: RunSpec, attempts: int, error: TrainingFailedError | Interrupted) -> None:
    from pipeline.runs.manifest import RunManifest
    from pipeline.tracking.mlflow_logger import MlflowLogger

    manifest = RunManifest.read(spec.run, lambda _: None)
    has_failed = isinstance(error, TrainingFailedError)
    # Nothing has begun; or it was stopped between two attempts, of which the first has told of its own end.
    if manifest is None or manifest.attempts <= attempts or not (has_failed or manifest.open):
        return
    failure = str(error)[:500] if has_failed else ""
    manifest.replaced(manifest.end(failure), spec.run, spec.claim)
    logger = MlflowLogger.of_run(spec.cfg.mlflow, spec.run, manifest.training_id, lambda _: None, spec.claim)
    logger.take_backlog(spec.attempt_name(manifest.attempts))
    if has_failed:
        logger.set_tags({"pipeline.failure": failure})
    logger.close("FAILED" if has_failed else "KILLED", *MLFLOW_HANDOVER_S)
