"""Ray: starts or joins a cluster, runs `fit` on its workers, watches over them.

Ray Train places the workers, sets up torch's process group, and starts them anew when one fails; they
then find the newest valid checkpoint in the run's folder themselves. Checkpoints are not handed to
`ray.train.report`: it is a barrier over all ranks, its record of checkpoints is written in place, and a
restart fails if a checkpoint in that record was pruned or damaged.

A session also ends, with a checkpoint, when a node that a worker runs on is drained, or when there is room
for more workers; the next one begins with those that there are then. Ray's own resizing of a healthy group
would stop the workers without one.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import cluster
from pipeline.config import Config, ConfigError
from pipeline.job import Context, Event, Fault, Job, StopReason
from pipeline.link import Link
from pipeline.supervise import TrainingFailedError

POLL_SECONDS = 0.1
CLUSTER_POLL_SECONDS = 2.0
WAITING_SECONDS = 60.0  # without workers, before it is told what they wait for
NEVER_SECONDS = 1e9


class ClusterLostError(RuntimeError):
    """The Ray cluster has gone, or the driver's way to it."""


def train(
    job: Job,
    watch: Callable[[Event], None],
    wants_stop: threading.Event,
    *,
    faults: tuple[Fault, ...] = (),
    again: bool = False,
) -> dict[str, Any]:
    """Run a training on a Ray cluster and wait for its end.

    Args:
        watch: called with each event in turn, in this thread.
        wants_stop: set from outside to have a checkpoint saved and the training end as "interrupted".
        faults: what ended earlier drivers since the last session began.
        again: wait for a cluster that is away: it was there before.

    Returns:
        The summary that rank 0's `fit` returns.

    Raises:
        ConfigError: the cluster or a checkpoint does not fit the configuration.
        TrainingFailedError: the workers failed more often than cluster.max_failures allows, or for good.
        ClusterLostError: a new driver may go on where this one ends.
    """
    with _connected(job.cfg, again):
        try:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            link = ray.remote(Link).options(num_cpus=0, scheduling_strategy=here)
            driver = _Driver(job, link.remote(job.cfg.cluster.max_failures, faults), watch, wants_stop)
            while True:
                summary = driver.run_session()
                if summary["status"] != "regroup":
                    return summary
        except ray.exceptions.RayError as e:
            raise ClusterLostError(f"the Ray cluster is lost: {_reason(e)}") from e


class _Driver:
    """Runs sessions, one group of workers after the other."""

    def __init__(self, job: Job, link: Any, watch: Callable[[Event], None], wants_stop: threading.Event):
        self._job, self._link, self._watch, self._wants_stop = job, link, watch, wants_stop
        self._size = cluster.size_of_worker(job.cfg.cluster)
        self._num_workers = 0  # of the session that runs
        self._since = time.monotonic()  # it has begun, or been waited for

    def run_session(self) -> dict[str, Any]:
        """Train until rank 0's `fit` returns; workers that fail are started anew meanwhile."""
        self._num_workers, self._since = 0, time.monotonic()
        outcome: dict[str, Any] = {}
        fitting = threading.Thread(target=_fit, args=(self._trainer(), outcome), daemon=True)
        fitting.start()
        told, looked = False, time.monotonic()
        while fitting.is_alive():
            fitting.join(POLL_SECONDS)
            self._pass_on()
            if self._wants_stop.is_set() and not told:
                told = True
                self._link.request_stop.remote("interrupted")
            if time.monotonic() - looked > CLUSTER_POLL_SECONDS:
                looked = time.monotonic()
                self._look_at_cluster()
        self._pass_on()
        if fatal := self._get(self._link.fatal.remote()):
            kind, text = fatal
            raise ConfigError(text) if kind == ConfigError.__name__ else TrainingFailedError(text)
        if "error" in outcome:
            raise outcome["error"]
        return dict(outcome["summary"])

    def _pass_on(self) -> None:
        for event in self._get(self._link.take_events.remote()):
            if event["kind"] == "start":
                self._num_workers, self._since = event["world_size"], time.monotonic()
            elif event["kind"] == "fault":
                self._num_workers, self._since = 0, time.monotonic()
            self._watch(event)

    def _look_at_cluster(self) -> None:
        settings, waited_s = self._job.cfg.cluster, time.monotonic() - self._since
        if not self._num_workers:
            if waited_s > WAITING_SECONDS:
                self._since = time.monotonic()
                self._watch({"kind": "warning", "text": cluster.why_waiting(settings, self._size)})
        elif cluster.draining() & self._get(self._link.nodes.remote()):
            self._regroup("a node that workers run on is drained")
        elif waited_s > settings.grow_after_s and (room := cluster.room(self._size)):
            more = min(settings.max_workers - self._num_workers, room)
            if more > 0:
                self._regroup(f"there is room for {more} more workers")

    def _regroup(self, why: str) -> None:
        self._since = time.monotonic()
        self._watch({"kind": "regroup", "text": why})
        self._link.request_stop.remote("regroup")

    def _get(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self._job.cfg.cluster.timeout_s)

    def _trainer(self) -> ray.train.torch.TorchTrainer:
        settings = self._job.cfg.cluster
        low, high = settings.min_workers, settings.max_workers
        return ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"job": self._job, "link": self._link, "num_threads": int(self._size["CPU"])},
            torch_config=ray.train.torch.TorchConfig(timeout_s=settings.timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=high if low == high else (low, high),
                elastic_resize_monitor_interval_s=NEVER_SECONDS,
                use_gpu=self._size["GPU"] > 0,
                resources_per_worker=self._size,
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=self._job.run.uri,
                failure_config=ray.train.FailureConfig(max_failures=-1),  # the link counts them
                callbacks=[_TellFaults(self._link)],
            ),
        )


class _TellFaults(ray.train.UserCallback):  # type: ignore[misc]
    """Runs in Ray Train's controller: passes on why workers failed, before they are started again."""

    def __init__(self, link: Any):
        self._link = link

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        reasons = [f"worker {rank} failed: {_reason(error)}" for rank, error in sorted(worker_exceptions.items())]
        ray.get(self._link.failed.remote("; ".join(reasons)))


def _fit(trainer: ray.train.torch.TorchTrainer, outcome: dict[str, Any]) -> None:
    """Fit in a thread, so that the driver's main thread can watch."""
    try:
        outcome["summary"] = trainer.fit().return_value or {}
    except ray.train.TrainingFailedError as e:
        outcome["error"] = TrainingFailedError(_reason(e))
    except Exception as e:  # raised again by the main thread
        outcome["error"] = e


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray worker runs; in a thread of its own, so it can install no signal handlers."""
    # Late: the driver's and the controller's processes import this module and have no use for these.
    from pipeline.checkpoint import CheckpointError
    from pipeline.data.dali import BadDataError
    from pipeline.identity import SupersededError
    from pipeline.train import NonFiniteLossError, fit

    job, link = config["job"], config["link"]
    here = ray.train.get_context()
    rank = here.get_world_rank()
    joined = ray.get(link.join.remote(rank, ray.get_runtime_context().get_node_id()))
    if joined is None:
        return {}
    attempt, faults = joined
    line = _Line(link, attempt, job.cfg.cluster.timeout_s)
    if rank == 0:
        threading.Thread(target=line.keep, name="link", daemon=True).start()
    context = Context(
        rank=rank,
        world_size=here.get_world_size(),
        device=ray.train.torch.get_device(),
        num_threads=config["num_threads"],
        emit=lambda event: link.emit.remote(attempt if rank == 0 else None, event),
        stop_reason=lambda: line.stop_reason,
        progress=line.progress,
        faults=faults,
    )
    try:
        return fit(job, context)
    except (ConfigError, NonFiniteLossError, BadDataError, CheckpointError, SupersededError) as e:
        ray.get(link.fail.remote(type(e).__name__, str(e)))  # a restart would meet it again
        raise


class _Line:
    """Rank 0's line to the driver, kept by a thread so that no step waits for an answer."""

    def __init__(self, link: Any, attempt: int, timeout_s: float):
        self._link, self._attempt, self._timeout_s = link, attempt, timeout_s
        self._step = 0
        self.stop_reason: StopReason | None = None

    def progress(self, step: int) -> None:
        self._step = step

    def keep(self) -> None:
        while True:
            asked = self._link.poll.remote(self._attempt, self._step)
            try:
                self.stop_reason = ray.get(asked, timeout=self._timeout_s)
            except ray.exceptions.RayError as e:  # cut off: others train on by now
                print(f"worker 0 ends, it has lost its driver: {e}", flush=True)
                os._exit(1)
            time.sleep(POLL_SECONDS)


@contextmanager
def _connected(cfg: Config, again: bool) -> Iterator[None]:
    """Connect to the cluster that the configuration or $RAY_ADDRESS names, else start one on this machine."""
    timeout_s = str(cfg.cluster.timeout_s)
    for name in ("WORKER_GROUP_START", "COLLECTIVE", "WORKER_HEALTH_CHECK"):
        os.environ.setdefault(f"RAY_TRAIN_{name}_TIMEOUT_S", timeout_s)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor a group; this driver looks itself
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            cluster.join(address, patience_s=cfg.cluster.timeout_s if again else 0)
        else:
            cluster.start(num_cpus=cfg.cluster.max_workers * (cfg.cluster.cpus_per_worker or 1))
    except (ConnectionError, RuntimeError, ValueError) as e:
        where = f"cluster.address={address}" if address else "Ray on this machine"
        reason = f"{where} cannot be reached: {str(e).splitlines()[0]}"
        raise (ClusterLostError(reason) if again else ConfigError(reason)) from None
    try:
        yield
    finally:
        ray.shutdown()


def _reason(error: BaseException) -> str:
    """The last line of a failed worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
