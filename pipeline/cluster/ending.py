"""How a training has ended, written into run.json and MLflow from outside of it: its workers may be dead."""

import threading
from collections.abc import Callable

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.failures import DRIVER_END_S, MLFLOW_HANDOVER_S, Interrupted, TrainingFailedError
from pipeline.runs.claim import Claim
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage

End = TrainingFailedError | Interrupted


def tell_end(spec: RunSpec, attempts: int, error: End, warn: Callable[[str], None]) -> None:
    """Tell it, by the driver.

    Args:
        attempts: that the run had had before the command; what became of these is not this one's to tell.
    """
    _try_to_tell(lambda: _tell_end(spec, attempts, error), warn)


def tell_for_driver(cfg: Config, place: str, command: str, error: End, warn: Callable[[str], None]) -> None:
    """The same, where no driver is left that could.

    Args:
        place: path or URI of the run's folder. command: see `Claim.take`; it had trained.
    """

    def tell() -> None:
        run = Storage(place)
        left = RunManifest.read(run, lambda _: None)
        if left is None or not left.open:  # it was told
            return
        # From now on workers of the driver that is lost, which may live on, write nothing more.
        claim = Claim.take(run, command, reclaims=True)
        _tell_end(RunSpec(cfg, run, "", "", claim=claim), 0, error)

    _try_to_tell(tell, warn)


def _try_to_tell(tell: Callable[[], None], warn: Callable[[str], None]) -> None:
    """For `DRIVER_END_S` at the most: the storage may be away, or hang."""
    problems = list[str]()

    def try_to() -> None:
        try:
            tell()
        except (OSError, RuntimeError, UserError) as e:
            problems.append(str(e))

    telling = threading.Thread(target=try_to, daemon=True)
    telling.start()
    telling.join(DRIVER_END_S)
    if telling.is_alive():
        problems.append(f"that takes longer than {DRIVER_END_S:g} s")
    for problem in problems:
        warn(f"run.json and MLflow are not told: {problem}")


def _tell_end(spec: RunSpec, attempts: int, error: End) -> None:
    from pipeline.tracking.mlflow_logger import MAX_TAG, MlflowLogger

    manifest = RunManifest.read(spec.run, lambda _: None)
    has_failed = isinstance(error, TrainingFailedError)
    # Nothing has begun; or it was stopped between two attempts, of which the first has told of its own end.
    if manifest is None or manifest.attempts <= attempts or not (has_failed or manifest.open):
        return
    failure = str(error)[:MAX_TAG] if has_failed else ""
    manifest.replaced(manifest.end(failure), spec.run, spec.claim)
    logger = MlflowLogger.of_run(spec.cfg.mlflow, spec.run, manifest.training_id, lambda _: None, spec.claim)
    logger.take_backlog(spec.attempt_name(manifest.attempts))
    if has_failed:
        logger.set_tags({"pipeline.failure": failure})
    logger.close("FAILED" if has_failed else "KILLED", MLFLOW_HANDOVER_S[0], DRIVER_END_S / 2)
