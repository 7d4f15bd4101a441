"""Ray: starts or joins a cluster, runs `fit` on its workers, watches over them.

A training is a chain of sessions. For each one the driver sees how many workers there is room for, and has
Ray Train place them, set up torch's process group and run them. They find the newest valid checkpoint in the
run's folder themselves. A session ends at the last step, or by a fault, or, with a checkpoint, when a node
that a worker runs on is drained and when there is room for more workers: the next one goes on from there.

Ray's own restarts and resizing are not used: they go by what the autoscaler last knew of the cluster, which
can be minutes old, and resizing stops workers without a checkpoint. Nor are checkpoints handed to
`ray.train.report`: it is a barrier over all ranks, its record of checkpoints is written in place, and a
restart fails if a checkpoint in that record was pruned or damaged.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import cluster, starting
from pipeline.config import Config, ConfigError
from pipeline.gauges import Gauges
from pipeline.job import Event, FailureBudget, Fault, Job, Marks
from pipeline.link import Link
from pipeline.supervise import Interrupted, TrainingFailedError
from pipeline.worker import POLL_SECONDS, train_on_worker

MAX_REASON = 240  # characters; Ray adds its advice
CLUSTER_POLL_SECONDS = 2.0
START_TIMEOUT_S = 600  # for the workers' processes, also where an image has to be pulled first
WAITING_SECONDS = 60.0  # without room for workers, before it is told what they wait for


class ClusterLostError(RuntimeError):
    """The Ray cluster has gone, or the driver's way to it."""


def train(
    job: Job,
    watch: Callable[[Event], None],
    wants_stop: threading.Event,
    marks: Marks,
    *,
    faults: tuple[Fault, ...] = (),
    again: bool = False,
) -> dict[str, Any]:
    """Run a training on a Ray cluster and wait for its end.

    Args:
        watch: called with each event in turn, in this thread.
        wants_stop: set from outside to have a checkpoint saved and the training end as "interrupted".
        marks: of the start so far.
        faults: what ended earlier drivers since the last session began.
        again: wait for a cluster that is away: it was there before.

    Returns:
        The summary that rank 0's `fit` returns.

    Raises:
        ConfigError: the cluster or a checkpoint does not fit the configuration.
        TrainingFailedError: the workers failed more often than cluster.max_failures allows, or for good.
        ClusterLostError: a new driver may go on where this one ends.
        Interrupted: it was to stop while no session ran.
    """
    with connected(job.cfg, again, wants_stop, lambda text: watch({"kind": "warning", "text": text})):
        try:
            return _Driver(job, watch, wants_stop, faults, (*marks, ("Ray", time.time())), again).run()
        except ray.exceptions.RayError as e:
            raise ClusterLostError(f"the Ray cluster is lost: {_reason(e)}") from e


class _Driver:
    """Runs sessions, one group of workers after the other."""

    def __init__(
        self,
        job: Job,
        watch: Callable[[Event], None],
        wants_stop: threading.Event,
        faults: tuple[Fault, ...],
        marks: Marks,
        again: bool,
    ):
        self._job, self._settings = job, job.cfg.cluster
        self._watch, self._wants_stop, self._faults = watch, wants_stop, faults
        self._marks, self._restarted = marks, again
        self._gauges = Gauges(job.run.name)
        self._size = cluster.size_of_worker(self._settings)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._link = ray.remote(Link).options(num_cpus=0, scheduling_strategy=here).remote()
        self._budget = FailureBudget(self._settings.max_failures)
        self._started: float | None = None  # when the workers of this session began to train

    def run(self) -> dict[str, Any]:
        """Run sessions until the training is done or stopped."""
        attempt = 0
        while True:
            num_workers, attempt, self._started = self._wait_for_room(), attempt + 1, None
            self._get(self._link.begin.remote(attempt))
            outcome = self._run_session(num_workers, attempt)
            self._marks, self._restarted = (("end of the last session", time.time()),), True
            if fatal := self._get(self._link.fatal.remote()):
                kind, text = fatal
                raise ConfigError(text) if kind == ConfigError.__name__ else TrainingFailedError(text)
            if isinstance(outcome, ray.train.TrainingFailedError):
                self._note_fault(outcome)
            elif isinstance(outcome, Exception):
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

    def _run_session(self, num_workers: int, attempt: int) -> Any:
        """Train until rank 0's `fit` returns.

        Returns:
            Its summary, or the exception that ended it.
        """
        outcome: list[Any] = []
        trainer = self._trainer(num_workers, attempt)
        fitting = threading.Thread(target=_fit, args=(trainer, outcome), daemon=True)
        fitting.start()
        looked = time.monotonic()
        place: cluster.Place | None = None
        with ExitStack() as wishes:
            while fitting.is_alive():
                fitting.join(POLL_SECONDS)
                self._pass_on()
                if self._wants_stop.is_set():
                    self._link.request_stop.remote("interrupted")
                if self._started and time.monotonic() - looked > CLUSTER_POLL_SECONDS:
                    looked = time.monotonic()
                    if place is None and num_workers < self._settings.max_workers:  # now that the others have theirs
                        place = wishes.enter_context(cluster.Place(self._size, 1))
                    self._look_at_cluster(self._started, place)
        self._pass_on()
        return outcome[0]

    def _pass_on(self) -> None:
        self._gauges.export()
        for event in self._get(self._link.take_events.remote()):
            if event["kind"] == "start":
                self._started, self._faults = time.monotonic(), ()
            elif event["kind"] == "checkpoint":
                self._budget.progressed()
            self._tell(event)

    def _tell(self, event: Event) -> None:
        self._gauges.event(event)
        self._watch(event)

    def _note_fault(self, error: "ray.train.TrainingFailedError") -> None:
        failures = getattr(error, "worker_failures", {})
        workers = [f"worker {rank} failed: {_reason(e)}" for rank, e in sorted(failures.items())]
        text = "; ".join(workers) or _reason(error)
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

    def _trainer(self, num_workers: int, attempt: int) -> "_Trainer":
        config = {
            "job": self._job,
            "link": self._link,
            "attempt": attempt,
            "faults": self._faults,
            "marks": self._marks,
            "restarted": self._restarted,
            "num_threads": int(self._size["CPU"]),
        }
        return _Trainer(
            train_on_worker,
            train_loop_config=config,
            torch_config=ray.train.torch.TorchConfig(timeout_s=self._settings.timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers, use_gpu=self._size["GPU"] > 0, resources_per_worker=self._size
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=self._job.run.uri,
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]  # what comes from ray is Any
    """Ray's, but without Ray Data, and without its cleaner of placement groups where that cannot work.

    Ray Data would take an actor and an import of its own in each session. The cleaner asks the dashboard whether the
    controller lives. Without a dashboard it asks in vain, and each session's end waits 12 s for it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        dropped = (DatasetsCallback,) if cluster.has_dashboard() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, dropped)]


def _fit(trainer: _Trainer, outcome: list[Any]) -> None:
    """Fit in a thread, so that the driver's main thread can watch."""
    try:
        outcome.append(trainer.fit().return_value)
    except Exception as e:  # told apart by the main thread
        outcome.append(e)


@contextmanager
def connected(
    cfg: Config, again: bool, wants_stop: threading.Event, warn: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Connect to the cluster that the configuration or $RAY_ADDRESS names, else start one on this machine."""
    timeout_s = cfg.cluster.timeout_s
    for name, seconds in {
        "WORKER_GROUP_START": max(timeout_s, START_TIMEOUT_S),
        "COLLECTIVE": timeout_s,
        "WORKER_HEALTH_CHECK": timeout_s,
    }.items():
        os.environ.setdefault(f"RAY_TRAIN_{name}_TIMEOUT_S", str(seconds))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor a group; this driver looks itself
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            cluster.join(address, cfg.cluster.timeout_s if again else 0, wants_stop)
        else:
            num_cpus = cfg.cluster.max_workers * (cfg.cluster.cpus_per_worker or 1)
            starting.start_patiently(lambda: cluster.start(num_cpus), warn, wants_stop)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        if wants_stop.is_set():
            raise Interrupted from None
        if isinstance(e, starting.RayStartError):
            raise (ClusterLostError(str(e)) if again else e) from None
        reason = f"cluster.address={address} cannot be reached: {str(e).splitlines()[0]}"
        raise (ClusterLostError(reason) if again else ConfigError(reason)) from None
    try:
        yield
    finally:
        ray.shutdown()


def _reason(error: BaseException) -> str:
    """The last line of a failed worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Not the closing bracket of something printed, nor Ray's advice on its timeouts.
    telling = [line for line in lines if len(line) > 2 and not line.startswith("Set the ")]
    return telling[-1][:MAX_REASON] if telling else type(error).__name__
