"""Runs `fit` on the workers of a Ray cluster, and watches over them.

A training is a chain of sessions. For each one the driver sees how many workers there is room for, and has
Ray Train place them, set up torch's process group and run them. They find the newest valid checkpoint in the
run's folder themselves. A session ends at the last step, or by a fault, or, with a checkpoint, when a node
that a worker runs on is drained and when there is room for more workers: the next one goes on from there.

Ray's own restarts and resizing are not used: they go by what the autoscaler last knew of the cluster, which
can be minutes old, and resizing stops workers without a checkpoint. Nor are checkpoints handed to
`ray.train.report`: it is a barrier over all ranks, its record of checkpoints is written in place, and a
restart fails if a checkpoint in that record was pruned or damaged.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import cluster
from pipeline.config import ConfigError
from pipeline.connection import last_line
from pipeline.gauges import Gauges
from pipeline.job import Event, FailureBudget, Fault, Job, Marks
from pipeline.link import Link
from pipeline.supervise import Interrupted, TrainingFailedError
from pipeline.trainer import Trainer
from pipeline.worker import train_on_worker

POLL_SECONDS = 0.5
CLUSTER_POLL_SECONDS = 2.0
WAITING_SECONDS = 60.0  # without room for workers, before it is told what they wait for


class TrainController:
    """Runs the sessions of a training, one group of workers after the other, on the cluster that is connected to.

    Args:
        watch: called with each event in turn, in the thread that calls `run`.
        wants_stop: set from outside to have a checkpoint saved and the training end as "interrupted".
        faults: what ended earlier drivers since the last session began.
        restarted: an earlier driver had begun.

    Raises:
        ConfigError: the cluster does not fit the configuration.
    """

    def __init__(
        self,
        job: Job,
        watch: Callable[[Event], None],
        wants_stop: threading.Event,
        *,
        faults: tuple[Fault, ...],
        restarted: bool,
    ):
        self._job, self._settings, self._watch, self._wants_stop = job, job.cfg.cluster, watch, wants_stop
        self._faults, self._restarted = faults, restarted
        self._gauges = Gauges(job.run.name)
        self._size = cluster.size_of_worker(self._settings)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._link = ray.remote(Link).options(num_cpus=0, scheduling_strategy=here).remote()
        self._budget = FailureBudget(self._settings.max_failures)
        self._attempt = 0
        self._trains = False  # in this session
        self._started: float | None = None  # when this session's workers began to train, as long as it is to go on

    def run(self, marks: Marks) -> dict[str, Any]:
        """Run sessions until the training is done or stopped.

        Args:
            marks: of the start so far.

        Returns:
            The summary that rank 0's `fit` returns.

        Raises:
            ConfigError: a checkpoint does not fit the configuration.
            TrainingFailedError: the workers failed more often than cluster.max_failures allows, or for good.
            ray.exceptions.RayError: the cluster is lost.
            Interrupted: it was to stop while no session ran.
        """
        while True:
            if self._wants_stop.is_set():
                raise Interrupted
            num_workers, self._attempt = self._wait_for_room(), self._attempt + 1
            self._trains, self._started = False, None
            outcome = self._run_session(num_workers, marks)
            marks, self._restarted = (("end of the last session", time.time()),), True
            if fatal := self._get(self._link.fatal.remote()):
                kind, text = fatal
                raise ConfigError(text) if kind == ConfigError.__name__ else TrainingFailedError(text)
            if isinstance(outcome, ray.train.TrainingFailedError):
                self._note_fault(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            elif outcome["status"] != "regroup":
                return dict(outcome)

    def _wait_for_room(self) -> int:
        """How many workers there is room for, once that is enough."""
        settings, since = self._settings, time.monotonic()
        while True:
            self._gauges.export()
            if self._wants_stop.is_set():
                raise Interrupted
            if num_workers := cluster.reserve(self._size, settings.min_workers, settings.max_workers):
                return num_workers
            self._wants_stop.wait(CLUSTER_POLL_SECONDS)
            if time.monotonic() - since > WAITING_SECONDS:
                since = time.monotonic()
                self._tell({"kind": "warning", "text": cluster.why_waiting(settings, self._size)})

    def _run_session(self, num_workers: int, marks: Marks) -> Any:
        """Train until rank 0's `fit` returns.

        Returns:
            Its summary, or the exception that ended it.
        """
        config = {
            "job": self._job,
            "link": self._link,
            "attempt": self._attempt,
            "faults": self._faults,
            "marks": marks,
            "restarted": self._restarted,
            "num_threads": int(self._size["CPU"]),
        }
        outcome: list[Any] = []
        fitting = threading.Thread(target=self._fit, args=(num_workers, config, outcome), daemon=True)
        fitting.start()
        self._get(self._link.begin.remote(self._attempt))  # the link's process starts beside the workers'
        looked = time.monotonic()
        place: cluster.Place | None = None
        with ExitStack() as wishes:
            asked = self._link.take_events.remote()
            while fitting.is_alive():
                if ray.wait([asked], timeout=POLL_SECONDS)[0]:
                    self._pass_on(self._get(asked))
                    asked = self._link.take_events.remote()
                if self._wants_stop.is_set():
                    if not self._trains:  # there is nothing to save
                        raise Interrupted
                    self._link.request_stop.remote("interrupted")
                if time.monotonic() - looked > CLUSTER_POLL_SECONDS:
                    looked = time.monotonic()
                    self._gauges.export()
                    if self._started is None:
                        continue
                    if place is None and num_workers < self._settings.max_workers:  # the others have theirs
                        place = wishes.enter_context(cluster.Place(self._size, 1))
                    self._look_at_cluster(self._started, place)
        self._pass_on(self._get(asked))
        self._pass_on(self._get(self._link.take_events.remote(wait=False)))
        return outcome[0]

    def _pass_on(self, events: list[Event]) -> None:
        for event in events:
            if event["kind"] == "start":
                self._trains, self._started, self._faults = True, time.monotonic(), ()
            elif event["kind"] == "checkpoint":
                self._budget.progressed()
            self._tell(event)

    def _tell(self, event: Event) -> None:
        self._gauges.event(event)
        self._watch(event)

    def _note_fault(self, error: "ray.train.TrainingFailedError") -> None:
        failures = getattr(error, "worker_failures", {})
        workers = [f"worker {rank} failed: {last_line(e)}" for rank, e in sorted(failures.items())]
        text = "; ".join(workers) or last_line(error)
        if self._budget.failed():
            raise TrainingFailedError(f"{text}; this is one failure too many without a checkpoint in between")
        self._faults = (*self._faults, Fault(text, self._get(self._link.step.remote()), time.time()))
        self._tell({"kind": "fault", "text": text})

    def _look_at_cluster(self, started: float, place: cluster.Place | None) -> None:
        """End the session where its nodes are to go, or one more worker has its place."""
        why, ready = "", time.monotonic() - started > self._settings.grow_after_s
        if cluster.draining() & self._get(self._link.nodes.remote()):
            why = "a node that workers run on is drained"
        elif ready and place is not None and place.granted():
            why = "there is room for more workers"
        if why:
            self._started = None  # it is about to end; look no more
            self._tell({"kind": "regroup", "text": why})
            self._link.request_stop.remote("regroup")

    def _get(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self._settings.timeout_s)

    def _fit(self, num_workers: int, config: dict[str, Any], outcome: list[Any]) -> None:
        """Fit in a thread, so that the driver's main thread can watch."""
        try:
            with TemporaryDirectory(prefix="pipeline-ray-") as unused:
                outcome.append(self._trainer(num_workers, config, unused).fit().return_value)
        except BaseException as e:  # told apart by the main thread
            outcome.append(e)
        finally:
            self._link.emit.remote(config["attempt"], {"kind": "end"})  # the main thread waits for events

    def _trainer(self, num_workers: int, config: dict[str, Any], storage: str) -> Trainer:
        return Trainer(
            train_on_worker,
            train_loop_config=config,
            torch_config=ray.train.torch.TorchConfig(timeout_s=self._settings.timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers, use_gpu=self._size["GPU"] > 0, resources_per_worker=self._size
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=storage,  # Ray wants one, and nothing is put there
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
