"""Checkpoints beside training: the loop pays for one copy in memory, a thread does the rest.

One checkpoint is written at a time. The thread tries again while the disk is full or the storage away; a
newer checkpoint then takes the place of the one that could not be written. On a full disk the oldest one gives way. Of
one step there is one: its scores are added once they are known.
"""

import errno
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Config
from pipeline.failures import backoff
from pipeline.runs import checkpoint, retention
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.host_copy import to_host
from pipeline.storage import Storage

QUIET_S = 10.0  # to wait for a checkpoint before that is told


@dataclass
class _Outage:
    """The time in which nothing can be written, over all that is tried in it."""

    num_tries: int = 0
    num_given_way: int = 0  # to a newer one
    problem: str = ""

    def is_new(self, problem: str) -> bool:
        """Take a try that failed; whether it was by something else than the one before. Names of files don't count."""
        self.num_tries += 1
        before, self.problem = self.problem, re.sub(r"step_\d+\S*", "", problem)
        return self.problem != before

    def end(self) -> str:
        """What is worth telling at its end."""
        tries, given_way = self.num_tries, self.num_given_way
        self.num_tries, self.num_given_way, self.problem = 0, 0, ""
        gave_way = f", for which {given_way} before it gave way" if given_way else ""
        return f"{tries} tries that failed{gave_way}" if tries else ""


class AsyncCheckpointer:
    """Writes the checkpoints of one attempt.

    Args:
        folder: where they go; it must exist.
        check: see `checkpoint.save`. keep: called before a checkpoint or its scores are written; has what is logged so
            far outlive this machine.
        written: called in the writing thread with each checkpoint and the seconds that it took.
        scored: called in that thread with a checkpoint that has got its scores.
        warn: called in that thread with a line for the user.
        free: called on a full disk where no checkpoint can give way; says what did, if anything.
        newest: the checkpoint that the attempt goes on from.

    Attributes:
        newest: the checkpoint written last, or the one before this attempt.
        is_scored_later: the weights of the one saved last are being evaluated.
        num_postponed, num_failed_tries: so far. blocking_s: what the loop paid for the one saved last, seconds.
    """

    def __init__(
        self,
        folder: Storage,
        cfg: Config,
        *,
        check: Callable[[], None],
        keep: Callable[[], None] = lambda: None,
        written: Callable[[Checkpoint, float], None],
        scored: Callable[[Checkpoint], None] = lambda _: None,
        warn: Callable[[str], None],
        free: Callable[[], str | None] = lambda: None,
        newest: Checkpoint | None = None,
    ):
        self._folder, self._cfg = folder, cfg
        self._check, self._keep, self._written, self._scored = check, keep, written, scored
        self._warn, self._free = warn, free
        self.newest = newest
        self._step = newest.step if newest and newest.place.parent.uri == folder.uri else None  # of the one saved last
        # What is newer than what is gone on from was skipped for its damage.
        first_step, carried = self._step or 0, newest.meta.get("damaged", ()) if newest and self._step else ()
        numbers = (name.removeprefix("step_") for name in checkpoint.names_in(folder))
        steps = (int(number) for number in numbers if number.isdecimal())
        self._damaged = frozenset(step for step in steps if step > first_step or step in carried)
        self._written_steps = frozenset[int]()
        self._host: dict[str, Any] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._replaced = threading.Event()
        self._begun, self._timeout_s = 0.0, cfg.cluster.timeout_s
        self._problem: str | None = None  # what keeps the one being written from being done
        self._outage = _Outage()
        self._is_postponed = self.is_scored_later = False
        self._unscored: dict[int, tuple[Checkpoint, dict[str, float]]] = {}  # by step: whose scores are not in it yet
        self.num_postponed = self.num_failed_tries = 0
        self.blocking_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, and nothing keeps it from being done."""
        return self._writing is not None and not self._writing.done() and self._problem is None

    @property
    def wants_save(self) -> bool:
        """Whether a checkpoint that was postponed can be taken now."""
        return self._is_postponed and not self.busy

    def save(
        self,
        step: int,
        state_dict: Callable[[], dict[str, Any]],
        meta: Callable[[], dict[str, Any]],
        *,
        now: bool,
        is_scored_later: bool = False,
    ) -> None:
        """Copy the state of `step` and have it written, unless its checkpoint has been.

        Args:
            state_dict: called for the state, of which a copy is made at once; what it raises is raised.
            meta: called for what else belongs into meta.json, see `checkpoint.save`.
            now: wait for one that is being written, unless that does not succeed; else this one is postponed.

        Raises:
            TimeoutError: one is being written for longer than cluster.timeout_s: the storage hangs.
        """
        if self.has(step):
            return
        if self.busy and time.monotonic() > self._begun + self._timeout_s:  # a new process may do better
            raise TimeoutError(
                f"writing the checkpoint of step {self._step} to {self._folder} takes longer than "
                f"cluster.timeout_s={self._timeout_s:g}"
            )
        if self.busy and not now:
            self.num_postponed += not self._is_postponed
            self._is_postponed = True
            return
        began = time.monotonic()
        state = state_dict()
        self._settle()
        self._step, self.is_scored_later, self._is_postponed = step, is_scored_later, False
        self._host = to_host(state, self._host)
        self._writing, self._begun = self._thread.submit(self._write, self._host, meta()), time.monotonic()
        self.blocking_s = self._begun - began

    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step has been saved, if perhaps not written yet."""
        return self._step == step

    def add_scores(self, step: int, scores: dict[str, float]) -> None:
        """Have the scores of its weights written into the checkpoint of this step, if it was written."""
        if not self.busy:
            self._begun = time.monotonic()
        self._writing = self._thread.submit(self._add_scores, step, scores, after=self._writing)

    def finish(self, timeout_s: float) -> None:
        """Wait until all is written.

        Raises:
            TimeoutError: it could not be done within `timeout_s` seconds.
        """
        if self._writing is not None:
            quiet_s = min(QUIET_S, timeout_s)
            try:
                if not wait([self._writing], quiet_s).done:
                    self._warn(f"waiting up to {timeout_s:.0f} s for the checkpoint of step {self._step}")
                self._writing.result(timeout_s - quiet_s)
            except TimeoutError:
                self._replaced.set()
                raise TimeoutError(
                    f"no checkpoint could be written to {self._folder} for {timeout_s:.0f} s: {self._problem}"
                ) from None
        self._thread.shutdown()

    def _settle(self) -> None:
        if self._writing is not None:
            if self._problem is not None:
                self._replaced.set()
            self._writing.result()
        self._replaced.clear()
        self._problem = None

    def _write(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        began, training = time.monotonic(), meta["training_id"]
        saved = self._persist(
            f"checkpoint of step {state['step']}",
            lambda: checkpoint.save(self._folder, state, self._cfg, meta, self._check),
            lambda: self._make_room(training) or self._free(),
        )
        if saved is None:
            return
        self.newest = saved
        self._written_steps |= {saved.step}
        self._written(saved, time.monotonic() - began)
        for late in list(self._unscored.values()):
            self._score(*late)
        if self._unscored:  # one of them may be the best
            return
        try:
            retention.prune(self._folder, self._cfg.checkpoint.keep, training, saved.step, self._is_damaged)
        except OSError as e:
            self._warn(f"old checkpoints in {self._folder} cannot be deleted: {e}")

    @property
    def damaged(self) -> list[int]:
        """Steps of checkpoints that are known to be, for the meta.json of the next one: sizes do not tell."""
        return sorted(self._damaged - self._written_steps)

    def _is_damaged(self, step: int) -> bool:
        return step in self._damaged - self._written_steps

    def best(self, training_id: str) -> Checkpoint | None:
        """Of a training's, the one with the highest top-1."""
        return retention.best_of(retention.own(self._folder, training_id, self._is_damaged))

    def _add_scores(self, step: int, scores: dict[str, float], after: Future[None] | None) -> None:
        if after is not None:
            after.result()  # it is done; an error of its own counts
        if self.newest is not None and self.newest.step == step:
            self._score(self.newest, scores)

    def _score(self, saved: Checkpoint, scores: dict[str, float]) -> None:
        """Write scores into a checkpoint; where a newer one comes first, that is made up for after it."""
        self._unscored[saved.step] = saved, scores

        def write() -> Checkpoint:
            self._check()
            return checkpoint.with_scores(saved, scores)

        if (scored := self._persist(f"evaluation of step {saved.step}", write)) is None:
            return
        del self._unscored[saved.step]
        if self.newest is saved:
            self.newest = scored
        self._scored(scored)

    def _persist(
        self, what: str, write: Callable[[], Checkpoint], make_room: Callable[[], str | None] = lambda: None
    ) -> Checkpoint | None:
        """What `write` makes, tried until the storage takes it; None where a newer checkpoint came first."""
        for pause in backoff():
            try:
                self._keep()
                saved = write()
            except OSError as e:
                self.num_failed_tries += 1
                self._problem = str(e)
                if self._outage.is_new(self._problem):  # the same again is told at its end
                    self._warn(f"the {what} cannot be written to {self._folder}, trying again: {self._problem}")
                freed = e.errno in (errno.ENOSPC, errno.EDQUOT) and self._frees(make_room, what)
                if self._replaced.wait(0 if freed else pause):
                    self._outage.num_given_way += 1
                    return None
            else:
                self._problem = None
                if told := self._outage.end():
                    self._warn(f"the {what} is written, after {told}")
                return saved
        raise AssertionError("the pauses never end")

    def _make_room(self, training: str) -> str | None:
        self._check()  # nothing of a run that is another driver's is deleted
        in_use = {*self._unscored, *([self.newest.step] if self.newest else [])}
        oldest = retention.make_room(self._folder, training, in_use, self._is_damaged)
        return None if oldest is None else str(oldest.place)

    def _frees(self, make_room: Callable[[], str | None], what: str) -> bool:
        """Whether something could be deleted for a new checkpoint."""
        try:
            oldest = make_room()
        except OSError as e:
            self._warn(f"no room can be made in {self._folder}: {e}")
            return False
        if oldest is not None:
            self._warn(f"the disk is full: deleted {oldest} to make room for the {what}")
        return oldest is not None
