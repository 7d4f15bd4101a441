"""What comes of a failure: one count for driver and supervisor, and what a new attempt may change."""

import errno
import os
from pathlib import Path

import pytest

from pipeline import failures
from pipeline.cluster import supervisor
from pipeline.cluster.ray_start import RayStartError
from pipeline.config.loading import load
from pipeline.data.loading.bad_images import BadDataError
from pipeline.errors import UserError
from pipeline.events import AttemptFailed, AttemptStarted, Event
from pipeline.failures import (
    ClusterLostError,
    DamagedError,
    FailureBudget,
    FatalError,
    Interrupted,
    NonFiniteError,
    TrainingFailedError,
)
from pipeline.runs.claim import SupersededError


def test_only_a_newer_checkpoint_gives_back_the_budget() -> None:
    """One that a drained node or a stop makes at the step of the last one is no progress."""
    budget = FailureBudget(2)
    budget.started(40)
    for _ in range(2):
        assert not budget.failed()
        budget.saved(40)
    assert budget.failed()
    budget.saved(60)
    assert not budget.failed()


def test_the_pauses_between_attempts_grow_and_end_with_a_newer_checkpoint() -> None:
    budget, pauses = FailureBudget(-1), []
    assert budget.pause_s == 0
    for _ in range(5):
        assert not budget.failed()
        pauses.append(budget.pause_s)
    assert pauses == [0, 2, 10, 30, 30]
    budget.saved(0)
    assert budget.pause_s == 0


def test_driver_and_supervisor_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each driver has a worker's failure, then is lost: with max_failures=3 the fourth is one too many."""
    left = list[int]()

    def run(request: supervisor.TrainRequest, _: object, note: object, __: object) -> tuple[str, object]:
        assert callable(note)
        note(AttemptStarted(1, 0, 9, 4, None, 1, 1, "cpu", "fp32", "", {}, 0))
        left.append(request.budget.num_failures)
        note(AttemptFailed("worker 0 failed"))
        return "lost", "the driver was killed"

    monkeypatch.setattr(supervisor, "_run_driver", run)
    monkeypatch.setattr(failures, "PAUSES_BEFORE_ATTEMPT_S", (0,))
    events = list[Event]()
    with pytest.raises(TrainingFailedError, match="the driver was killed"):
        supervisor.train(load(None, ["data.train=x", "data.val=x"]), "x", None, events.append)
    assert left == [0, 2]
    assert sum(isinstance(event, AttemptFailed) for event in events) == 3


@pytest.mark.parametrize(
    ("error", "end", "replaced_at_first", "replaced_later"),
    [
        (UserError("x"), "user error", False, False),
        (TrainingFailedError("x"), "failed", False, False),
        (RayStartError("x"), "failed", False, False),
        (Interrupted(), "interrupted", False, False),
        (ClusterLostError("x"), "lost", True, True),
        (ImportError("x"), "internal error", False, True),
        (KeyError("x"), "internal error", False, True),
    ],
)
def test_how_a_driver_ends(error: BaseException, end: str, replaced_at_first: bool, replaced_later: bool) -> None:
    found = failures.driver_end(error)
    assert found == end
    assert failures.driver_is_replaced(found, begun=False) == replaced_at_first
    assert failures.driver_is_replaced(found, begun=True) == replaced_later


def test_an_unknown_error_is_left_to_the_log() -> None:
    assert failures.driver_end(MemoryError()) is None
    assert failures.driver_end(OSError()) is None


@pytest.mark.parametrize("kind", [NonFiniteError, BadDataError, SupersededError])
def test_what_a_new_attempt_would_meet_again_ends_the_run(kind: type[Exception]) -> None:
    assert issubclass(kind, FatalError)
    assert not failures.attempt_is_repeated(kind.__name__, begun=True)


def test_a_configuration_that_was_right_before_is_tried_again() -> None:
    assert failures.attempt_is_repeated(UserError.__name__, begun=True)
    assert not failures.attempt_is_repeated(UserError.__name__, begun=False)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM])
def test_a_failing_storage_says_nothing_of_one_file(code: int, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    for folder in (tmp_path, None):
        assert not failures.says_of_one_file(OSError(code, os.strerror(code)), folder)


def test_what_is_said_of_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    errors = [OSError(code, "") for code in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)]
    assert not any(failures.says_of_one_file(error, folder) for error in errors)  # the mount has gone
    folder.mkdir()
    assert not any(failures.says_of_one_file(error, folder) for error in errors)  # and left an empty folder
    (folder / "other").touch()
    assert all(failures.says_of_one_file(error, folder) for error in (*errors, DamagedError()))
    assert failures.says_of_one_file(FileNotFoundError(errno.ENOENT, ""), None)
    assert not failures.says_of_one_file(PermissionError(), None)  # an object store's may be the whole bucket's
