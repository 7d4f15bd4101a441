"""Runs `fit` on the workers of a Ray cluster, and watches over them.

A training is a chain of attempts. For each one the driver sees how many workers there is room for, and has
Ray Train place them, set up torch's process group and run them. They find the newest valid checkpoint in the
run's folder themselves. An attempt ends at the last step, or by a failure, or, with a checkpoint, when a node
that a worker runs on is drained and when there is room for more workers: the next one goes on from there.

Ray's own restarts and resizing are not used: they go by what the autoscaler last knew of the cluster, which
can be minutes old, and resizing stops workers without a checkpoint. Nor are checkpoints handed to
`ray.train.report`: it is a barrier over all ranks, its record of checkpoints is written in place, and a
restart fails if a checkpoint in that record was pruned or damaged.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipeline import machine
from pipeline.cluster import ray_cluster
from pipeline.cluster.channel import EventChannel
from pipeline.cluster.connection import how_it_ended, last_line
from pipeline.cluster.prometheus import Gauges
from pipeline.cluster.trainer import TorchConfig, Trainer
from pipeline.cluster.worker import train_on_worker
from pipeline.errors import UserError
from pipeline.events import (
    AttemptEnded,
    AttemptFailed,
    AttemptStarted,
    CheckpointWritten,
    CrashingImageFound,
    Event,
    ImageSearchStarted,
    Resizing,
    Warned,
)
from pipeline.failures import (
    FailureBudget,
    Interrupted,
    NoGpuError,
    StoppedWaitingError,
    TrainingFailedError,
    attempt_is_repeated,
)
from pipeline.runs.spec import Failure, Marks, RunSpec

POLL_S = 0.5
CLUSTER_POLL_S = 2.0
FINISH_S = 5.0  # for what the workers of an attempt had still to say; a host that is cut off says nothing
UNUSED_GPUS = (
    "this machine has GPUs, but Ray finds none: training on the CPU; `pipeline doctor` says why; if it is meant, set "
    "cluster.device=cpu"
)
WAITING_S = 60.0  # without room for workers, before it is told what they wait for


class TrainController:
    """Runs the attempts of a training, one group of workers after the other, on the cluster that is connected to.

    Args:
        emit: called with each event in turn, in the thread that calls `run`.
        wants_stop: set from outside to have a checkpoint saved and the training end as "interrupted".
        budget: of failures, as far as it is used up.
        failures: what ended earlier drivers since the last attempt began.
        restarted: an earlier driver had begun.

    Raises:
        UserError: the cluster does not fit the configuration.
    """

    def __init__(
        self,
        spec: RunSpec,
        emit: Callable[[Event], None],
        wants_stop: threading.Event,
        budget: FailureBudget,
        *,
        failures: tuple[Failure, ...],
        restarted: bool,
    ):
        self._spec, self._settings, self._emit, self._wants_stop = spec, spec.cfg.cluster, emit, wants_stop
        self._failures, self._restarted = failures, restarted
        self._gauges = Gauges(spec.run.name)
        self._worker_resources = ray_cluster.size_of_worker(self._settings)
        self._channel = EventChannel(ray.util.get_node_ip_address(), self._settings.timeout_s)
        self._budget = budget
        self._deaths: tuple[int, ...] = ()  # steps at which workers' processes died, no checkpoint being newer
        self._attempt = 0
        self._has_trained, self._saved_step = restarted, spec.saved_step  # at any time
        self._trains = False  # in this attempt
        self._summary: dict[str, Any] | None = None  # of this attempt, where rank 0 has ended it for all
        self._started: float | None = None  # when this attempt's workers began to train, as long as it is to go on

    def run(self, marks: Marks) -> dict[str, Any]:
        """Run attempts until the training is done or stopped.

        Args:
            marks: of the start so far.

        Returns:
            The summary that rank 0's `fit` returns.

        Raises:
            UserError: a checkpoint does not fit the configuration.
            TrainingFailedError: the workers failed more often than cluster.max_failures allows, or for good.
            ray.exceptions.RayError: the cluster is lost.
            Interrupted: it was to stop while no attempt ran.
        """
        if not self._worker_resources["GPU"] and self._settings.device == "auto" and machine.has_unused_gpus():
            self._send(Warned(UNUSED_GPUS))
        with closing(self._channel):
            return self._run_attempts(marks)

    def _run_attempts(self, marks: Marks) -> dict[str, Any]:
        while True:
            if self._wants_stop.is_set():
                raise Interrupted
            with self._wait_for_room() as reservation:
                self._attempt, self._trains = self._attempt + 1, False
                self._started = self._summary = None
                outcome = self._run_attempt(reservation, marks)
            marks, self._restarted = (("end of the last attempt", time.time()),), True
            if not isinstance(outcome, BaseException):
                if outcome["status"] == "resize":
                    continue
                return dict(outcome)
            kind, text = self._channel.fatal or ("", "")
            if kind and not attempt_is_repeated(kind, self._has_trained):
                raise UserError(text) if kind == UserError.__name__ else TrainingFailedError(text)
            if kind == StoppedWaitingError.__name__ and self._wants_stop.is_set():
                raise Interrupted
            if isinstance(outcome, ray.train.TrainingFailedError):
                self._note_failure(outcome)
                self._wants_stop.wait(self._budget.pause_s)
            else:
                raise outcome

    def _wait_for_room(self) -> ray_cluster.Reservation:
        """Room for as many workers as there is, once that is enough."""
        settings, since = self._settings, time.monotonic()
        while True:
            self._gauges.export()
            if self._wants_stop.is_set():
                raise Interrupted
            if reservation := ray_cluster.reserve(self._worker_resources, settings.min_workers, settings.max_workers):
                return reservation
            self._wants_stop.wait(CLUSTER_POLL_S)
            if time.monotonic() - since > WAITING_S:
                since = time.monotonic()
                self._send(Warned(ray_cluster.why_waiting(settings, self._worker_resources)))

    def _run_attempt(self, reservation: ray_cluster.Reservation, marks: Marks) -> Any:
        """Train until rank 0's `fit` returns.

        Returns:
            Its summary, or the exception that ended it.
        """
        config = {
            "spec": dataclasses.replace(self._spec, saved_step=self._saved_step),
            "channel": {"address": self._channel.address, "key": self._channel.key},
            "attempt": self._attempt,
            "failures": self._failures,
            "marks": marks,
            "restarted": self._restarted,
            "deaths": self._deaths if len(self._deaths) > 1 else (),
            "num_threads": int(self._worker_resources["CPU"]),
        }
        outcome: list[Any] = []
        self._channel.begin(self._attempt)
        fitting = threading.Thread(target=self._fit, args=(reservation, config, outcome), daemon=True)
        fitting.start()
        last_look = time.monotonic()
        extra: ray_cluster.Reservation | None = None
        with ExitStack() as reservations:
            while not outcome:
                self._pass_on(self._channel.take_events(POLL_S))
                if self._wants_stop.is_set():
                    if not self._trains:  # there is nothing to save
                        raise Interrupted
                    self._channel.request_stop("interrupted")
                if time.monotonic() - last_look > CLUSTER_POLL_S:
                    last_look = time.monotonic()
                    self._gauges.export()
                    if self._started is None:
                        continue
                    if extra is None and reservation.num_workers < self._settings.max_workers:
                        extra = reservations.enter_context(ray_cluster.Reservation(self._worker_resources, 1))
                    self._look_at_cluster(self._started, extra)
        self._channel.finish(FINISH_S)
        self._pass_on(self._channel.take_events(0))
        return self._summary or outcome[0]

    def _pass_on(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case AttemptStarted():
                    self._trains, self._started, self._failures = True, time.monotonic(), ()
                    self._has_trained = True
                    self._budget.started(event.step)
                case CheckpointWritten():
                    self._budget.saved(event.step)
                    self._saved_step = event.step
                    if event.step > max(self._deaths, default=0):
                        self._deaths = ()
                case AttemptEnded(summary):
                    self._summary = summary
                case ImageSearchStarted():  # once for these deaths
                    self._deaths = ()
                case CrashingImageFound():  # without that image it goes another way
                    self._budget.forgive()
            self._send(event)

    def _send(self, event: Event) -> None:
        self._gauges.event(event)
        self._emit(event)

    def _note_failure(self, error: "ray.train.TrainingFailedError") -> None:
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, (ImportError, NoGpuError)) and not self._has_trained:  # else it may be one new node's
            raise TrainingFailedError(f"a worker cannot start: {last_line(cause)}")
        failures = getattr(error, "worker_failures", {})
        dead = {rank: e for rank, e in failures.items() if _has_died(e)}
        self._deaths = (*self._deaths, self._channel.step) if dead and self._trains else ()  # those in a row
        failures = dead or failures  # the others have but lost these
        workers = [how_it_ended(rank, e, self._channel.crashes.get(rank)) for rank, e in sorted(failures.items())]
        text = "; ".join(workers) or last_line(error)
        if self._budget.failed():
            raise TrainingFailedError(
                f"{text}; that exceeds cluster.max_failures={self._settings.max_failures} without a new checkpoint; "
                "fix the cause, or raise cluster.max_failures"
            )
        self._failures = (*self._failures, Failure(text, self._channel.step, time.time()))
        self._send(AttemptFailed(text))

    def _look_at_cluster(self, started: float, extra: ray_cluster.Reservation | None) -> None:
        """End the attempt where its nodes are to go, or one more worker has its place."""
        why, ready = "", time.monotonic() - started > self._settings.grow_after_s
        if ray_cluster.draining() & self._channel.nodes:
            why = "a node that workers run on is drained"
        elif ready and extra is not None and extra.granted():
            why = "there is room for more workers"
        if why:
            self._started = None  # it is about to end; look no more
            self._send(Resizing(why))
            self._channel.request_stop("resize")

    def _fit(self, reservation: ray_cluster.Reservation, config: dict[str, Any], outcome: list[Any]) -> None:
        """Fit in a thread, so that the driver's main thread can watch."""
        try:
            with TemporaryDirectory(prefix="pipeline-ray-") as unused:
                outcome.append(self._trainer(reservation, config, unused).fit().return_value)
        except BaseException as e:  # told apart by the main thread
            outcome.append(e)
        finally:
            self._channel.wake()

    def _trainer(self, reservation: ray_cluster.Reservation, config: dict[str, Any], storage: str) -> Trainer:
        return Trainer(
            train_on_worker,
            group=reservation.group,
            ended=self._channel.ended,
            train_loop_config=config,
            backend_config=TorchConfig("nccl" if self._worker_resources["GPU"] else "gloo", self._settings.timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=reservation.num_workers,
                use_gpu=self._worker_resources["GPU"] > 0,
                resources_per_worker=self._worker_resources,
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=storage,  # Ray wants one, and nothing is put there
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )


def _has_died(error: BaseException) -> bool:
    """Whether a worker's process has, or again and again the one that reads images for it."""
    return isinstance(error, WorkerHealthCheckFailedError) or "readers.ReaderDiedError: " in str(error)
