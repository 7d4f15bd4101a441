"""The driver's process: prepares a run and trains it on Ray, for the supervisor at the other end of a pipe.

python -m pipeline.cluster.driver FILE_DESCRIPTOR
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.connection import connected
from pipeline.cluster.ending import tell_end
from pipeline.cluster.supervisor import TrainRequest
from pipeline.config.schema import Config
from pipeline.errors import UserError, one_line
from pipeline.events import Event, RunOpened, Warned
from pipeline.failures import (
    ClusterLostError,
    Interrupted,
    TrainingFailedError,
    backoff,
    driver_end,
)
from pipeline.runs.spec import RunSpec
from pipeline.training.watchdog import Watchdog

if TYPE_CHECKING:
    from pipeline.cluster.controller import TrainController


SLOW_S = 60.0  # to open a run, before that is told


class SupervisorConnection:
    """The other end. Where it has died, nobody listens, and the training is to stop."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.request: TrainRequest = connection.recv()
        self.wants_stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._connection.recv()  # it has but one thing to say
        self.wants_stop.set()

    def send(self, kind: str, content: Any) -> None:
        with contextlib.suppress(OSError):
            self._connection.send((kind, content))

    def emit(self, event: Event) -> None:
        self.send("event", event)

    def warn(self, text: str) -> None:
        self.emit(Warned(text))


def train(supervisor: SupervisorConnection) -> dict[str, Any]:
    """Open the run and train it.

    Ray's processes take seconds to start, and so do the imports here: both go on at the same time. To connect to Ray
    imports too, and where two threads import the same modules, one may see half of one: so that comes after.
    """
    request, began = supervisor.request, time.time()
    if not request.has_trained:
        with _watched(supervisor):
            _refuse_missing_data(request.cfg)
    imports = threading.Thread(target=_import, daemon=True)
    imports.start()
    with connected(request.cfg.cluster, request.restarted, supervisor.wants_stop, supervisor.warn, imports.join):
        ready = time.time()
        if supervisor.wants_stop.is_set():  # before there is a run
            raise Interrupted
        with contextlib.ExitStack() as stack:
            with _watched(supervisor) as heartbeat:
                spec, controller = stack.enter_context(_opened(supervisor, heartbeat))
            supervisor.emit(RunOpened(spec.run.name, str(spec.run)))
            first = "earlier driver" if request.restarted else "driver"
            marks = (("command", request.began), (first, began), ("Ray and imports", ready), ("run", time.time()))
            try:
                return controller.run(marks)
            except (TrainingFailedError, Interrupted) as e:
                tell_end(spec, 0 if request.has_trained else spec.attempts, e, supervisor.warn)
                raise


def _refuse_missing_data(cfg: Config) -> None:
    """Raise UserError for a mistyped path before Ray starts, which takes seconds, where all is on this machine."""
    if cfg.cluster.address or os.environ.get("RAY_ADDRESS"):
        return
    for split, source in (("train", cfg.data.train), ("val", cfg.data.val)):
        if "://" in source or "{" in source:
            continue
        try:
            Path(source).stat()
        except FileNotFoundError:
            fix = "give a folder of CLASS/image files, tar shards, Parquet files or an index"
            raise UserError(f"data.{split}: no folder or index file {source}; {fix}") from None
        except OSError:
            continue  # `open_run` looks again, and waits


@contextlib.contextmanager
def _watched(supervisor: SupervisorConnection) -> Iterator[Callable[[], None]]:
    """Tell of what takes long, as a mount may hang; end this process for it where training has begun.

    Before that its user is there, and to list millions of images may take longer than cluster.timeout_s.
    """
    request = supervisor.request
    where = f"run.storage={request.cfg.run.storage} and data.train={request.cfg.data.train}"
    timer = threading.Timer(
        SLOW_S, supervisor.warn, (f"still opening {where}; if a mount hangs, press Ctrl-C twice to stop",)
    )
    timer.daemon = True
    timer.start()
    try:
        if not request.has_trained:
            yield lambda: None
            return
        with Watchdog(request.cfg.cluster.timeout_s) as watchdog:
            yield watchdog.feed
    finally:
        timer.cancel()


@contextlib.contextmanager
def _opened(
    supervisor: SupervisorConnection, heartbeat: Callable[[], None]
) -> Iterator[tuple[RunSpec, "TrainController"]]:
    """The run, and what trains it on the cluster.

    What is refused to a training that has begun was right before: a mount or a node that comes late is waited for.
    """
    from pipeline.cluster.controller import TrainController
    from pipeline.training import open_run

    request, stop = supervisor.request, supervisor.wants_stop
    deadline, last_warning = time.monotonic() + request.cfg.cluster.timeout_s, ""
    with contextlib.ExitStack() as stack:
        for pause in backoff():
            heartbeat()
            try:
                with contextlib.ExitStack() as tried:
                    spec = tried.enter_context(
                        open_run.open_run(
                            request.cfg,
                            supervisor.warn,
                            request.resume_from,
                            stop,
                            heartbeat,
                            began=request.began,
                            command=request.command,
                            has_trained=request.has_trained,
                            saved_step=request.budget.saved_step,
                        )
                    )
                    controller = TrainController(
                        spec,
                        supervisor.emit,
                        stop,
                        request.budget,
                        failures=request.failures,
                        restarted=request.restarted,
                    )
                    stack.enter_context(tried.pop_all())
                break
            except UserError as e:
                if not request.has_trained:
                    raise
                if time.monotonic() + pause > deadline:
                    raise ClusterLostError(str(e)) from None
                if last_warning != str(e):
                    supervisor.warn(f"{e}; this worked earlier in this training, so it is tried again")
                last_warning = str(e)
            if stop.wait(pause):
                raise Interrupted
        yield spec, controller


def _import() -> None:
    with contextlib.suppress(Exception):  # told where it is imported again
        from pipeline.cluster import controller  # noqa: F401
        from pipeline.training import open_run  # noqa: F401


def main() -> None:
    supervisor = SupervisorConnection(Connection(int(sys.argv[1])))
    try:
        summary = train(supervisor)
    except BaseException as e:
        end = driver_end(e)
        if end is not None:
            supervisor.send(end, one_line(e) if end == "internal error" else str(e))
        if end in (None, "internal error"):
            raise  # the log has it all
    else:
        supervisor.send("done", summary)


if __name__ == "__main__":
    main()
