"""What each failure means: whose fault it is, how long it is waited for, and what comes next. Decided here alone.

A mistake of the user's (UserError: a setting, data that is not there, a checkpoint of another network)
    One line, exit code 2. In a training that has begun it was right before, so a mount or a node comes late: waited for
    (cluster.timeout_s), then an attempt's failure.
A file system, a mount or an object store that does not answer (OSError)
    Tried again (cluster.timeout_s; before anything has trained FIRST_LOOK_S; READ_CHECKPOINT_S where an older
    checkpoint would do), then an attempt's failure.
One image: missing from a folder that is there, cut off, undecodable (`says_of_one_file`)
    Another takes its place and it is counted; too many (data.max_bad_fraction) are a FatalError.
MLflow
    Never a training's failure: records wait on disk. At the end they are waited for (MLFLOW_END_S).
A worker, a node, a driver or the Ray cluster that dies, raises or is silent
    A new attempt from the newest checkpoint, after a pause, as often as `FailureBudget` allows.
A stop (a signal, a node that is drained) that comes while images are waited for
    They are waited for a little longer (STOP_WAIT_S); then the last step that is done is saved, and the attempt ends.
FatalError (a loss that is not finite, another driver in charge, ...)
    A new attempt would meet it again: ends the run, exit code 1.
The installation or the code (BROKEN), before anything has trained
    The same.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.errors import UserError

T = TypeVar("T")

# Seconds that each is waited for, where it is not cluster.timeout_s.
FIRST_LOOK_S = 10.0  # a remote storage, at the start: its name may be mistyped
READ_CHECKPOINT_S = 30.0  # one checkpoint of a storage that answers
UPLOAD_S = 90.0  # a folder that MLflow is to have; it is safe where it is
READ_SOURCE_S = 60.0  # images, outside of a training
LOCK_S = 60.0  # a process that has the run; one that is about to end is waited for as long as a storage
STOP_WAIT_S = 10.0  # images, by rank 0, which then saves, once all are to stop
STOP_WAIT_OTHERS_S = 150.0  # the same, by the others, whose end would end rank 0's saving
COMPILE_S = 600.0  # more for a step that compiles the network
MLFLOW_END_S = 30.0  # MLflow at a training's end; what is left waits on disk
MLFLOW_HANDOVER_S = 5.0, 60.0  # the same, where a new attempt is to go on; and in all, also where it answers
MLFLOW_CALL_S = 600.0  # a single call at the end, such as a large file's upload, that neither ends nor fails
DRIVER_END_S = 30.0  # a driver that has said all
DISCONNECT_S = 20.0  # Ray's goodbye; a raylet that stands still (in swap, SIGSTOP) never says it
PAUSES_BEFORE_ATTEMPT_S = (0, 2, 10, 30)  # after the first failure without a newer checkpoint, the second, ...

# Come of the installation, the environment or a mistake in the code: another process would meet them again.
BROKEN = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, TypeError, ValueError)
# How a driver ends. "user error": by a user's mistake. "internal error": by one of BROKEN. "never started": by itself,
# before it said anything. "lost": in any other way that a new one may do better than.
DriverEnd = Literal["done", "user error", "failed", "interrupted", "lost", "internal error", "never started"]


class FatalError(RuntimeError):
    """Ends the run: waiting changes nothing, and a new attempt would meet it again."""


class NonFiniteError(FatalError):
    """What the network computes became NaN or infinite; the text says where."""


class NoGpuError(RuntimeError):
    """torch cannot use the GPU that a worker was given."""


class CheckpointError(RuntimeError):
    """A checkpoint that must not be loaded; the text says which and why."""


class IncompleteError(CheckpointError):
    """A checkpoint that was never finished: it has no meta.json."""


class DamagedError(OSError):
    """A file is not what it should be; to read it once more would not help."""


class TrainingFailedError(RuntimeError):
    """The training ended before its last step; the text says why."""


class Interrupted(KeyboardInterrupt):
    """Ends a command without a summary: the user does not wait for one, or nothing was there to give it."""


class StoppedWaitingError(Exception):
    """This rank ends as all are to stop, and does not wait for the others: what it needs for a step does not come.

    Attributes:
        has_ended: rank 0 has saved and told all that an attempt's end takes.
    """

    has_ended = False


class ClusterLostError(ConnectionError):
    """The Ray cluster has gone, or the driver's way to it."""


def driver_end(error: BaseException) -> DriverEnd | None:
    """What a driver tells its supervisor of the error that ends it; None: nothing, its log says what is known."""
    kinds: dict[DriverEnd, type[BaseException] | tuple[type[BaseException], ...]] = {
        "user error": UserError,
        "failed": TrainingFailedError,
        "interrupted": Interrupted,
        "lost": ClusterLostError,
        "internal error": BROKEN,
    }
    return next((end for end, classes in kinds.items() if isinstance(error, classes)), None)


def driver_is_replaced(end: DriverEnd, begun: bool) -> bool:
    """Whether a new driver may do better; `begun`: something was trained, so that the installation is sound."""
    return end == "lost" or (begun and end in ("internal error", "never started"))


def attempt_is_repeated(kind: str, begun: bool) -> bool:
    """Whether a new attempt may do better, after a worker's error of the class `kind` that it named to the driver."""
    return kind == StoppedWaitingError.__name__ or (begun and kind == UserError.__name__)


def says_of_one_file(error: OSError, folder: Path | None) -> bool:
    """Whether an error says something of one file in `folder` (None: not on this machine), not of the whole storage.

    A disk or a mount that fails (EIO, ESTALE, EMFILE, ...) says nothing of the file. Nor does a file's absence where
    its mount has gone, which leaves an empty folder, or that it may not be read, where the whole mount's login has run
    out.
    """
    if isinstance(error, DamagedError) or (folder is None and isinstance(error, FileNotFoundError)):
        return True
    of_one = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return folder is not None and error.errno in of_one and any_entry(folder)


def any_entry(folder: Path) -> bool:
    """Whether there is anything in a folder, and the folder itself."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def mlflow_refuses(error: Exception) -> bool:
    """Whether sending the same record to MLflow again must fail again."""
    if isinstance(error, (FileNotFoundError, CheckpointError)):  # what is to be uploaded has gone
        return True
    return getattr(error, "error_code", None) in {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}


class FailureBudget:
    """Counts failures since the newest checkpoint: a run that gets on may fail any number of times.

    One for the whole run: the supervisor hands its own to each driver, and hears of what that counts.

    Args:
        max_failures: allowed without a newer checkpoint in between; -1 for any number.

    Attributes:
        saved_step: of the newest checkpoint that the run itself has been told to have; 0: of none.
    """

    def __init__(self, max_failures: int):
        self._max_failures, self.num_failures, self._newest_step, self.saved_step = max_failures, 0, -1, 0

    def started(self, step: int) -> None:
        """Training goes on from a checkpoint of this step."""
        self._newest_step = max(self._newest_step, step)

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step; it counts if none was as new."""
        self.saved_step = max(self.saved_step, step)
        if step > self._newest_step:
            self._newest_step, self.num_failures = step, 0

    def failed(self) -> bool:
        """Count a failure; True where it is one too many."""
        self.num_failures += 1
        return 0 <= self._max_failures < self.num_failures

    def forgive(self) -> None:
        """The cause of the failures so far is found, and will not come again."""
        self.num_failures = 0

    @property
    def pause_s(self) -> float:
        """How long to wait before the next attempt: what is broken may need time."""
        place = min(self.num_failures, len(PAUSES_BEFORE_ATTEMPT_S)) - 1
        return PAUSES_BEFORE_ATTEMPT_S[place] if place >= 0 else 0


def retry(
    action: Callable[[], T],
    warn: Callable[[str], None],
    timeout_s: float,
    *,
    on: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> T:
    """What `action` returns; while it fails with one of `on`, it is tried again for `timeout_s` seconds.

    What lasts is told once, and its end with the number of tries.
    """
    deadline, last_text, tries = time.monotonic() + timeout_s, "", 0
    for pause in backoff():
        try:
            result = action()
        except on as e:
            if time.monotonic() + pause > deadline:
                raise
            what = "the storage does not answer, " if isinstance(e, OSError) else ""
            if last_text != (text := f"{what}trying again: {e}"):
                warn(text)
            last_text, tries = text, tries + 1
            time.sleep(pause)
        else:
            if tries > 1:
                warn(f"it works again, after {tries} failed tries")
            return result
    raise AssertionError("the pauses never end")


def backoff() -> Iterator[int]:
    """Seconds to wait after each failed try."""
    yield from (1, 2, 5)
    yield from repeat(10)
