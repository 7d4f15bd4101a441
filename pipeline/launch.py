"""Ray: starts or joins a cluster, runs `fit` on its workers, watches over them.

Ray Train places the workers, sets up torch's process group, and starts them anew when one fails; they
then find the newest valid checkpoint in the run's directory themselves. Checkpoints are not handed to
`ray.train.report`: it is a barrier over all ranks, its record of checkpoints is written in place, and a
restart fails if a checkpoint in that record was pruned or damaged.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch

from pipeline.config import Config, ConfigError
from pipeline.job import Context, Event, Job
from pipeline.link import Link

POLL_SECONDS = 0.1
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OBJECT_STORE_BYTES = 100 * 2**20  # nothing goes through it but messages


class TrainingFailedError(RuntimeError):
    """The training ended before its last step; the text says why."""


class Interrupted(KeyboardInterrupt):
    """A second signal: the user does not wait for a checkpoint."""


def train(job: Job, watch: Callable[[Event], None]) -> dict[str, Any]:
    """Run a training on a Ray cluster and wait for its end.

    SIGINT, SIGTERM or SIGHUP once: checkpoint, then return a summary with status "interrupted".

    Args:
        watch: called with each event in turn, in this thread.

    Returns:
        The summary that rank 0's `fit` returns.

    Raises:
        ConfigError: the cluster or a checkpoint does not fit the configuration.
        TrainingFailedError: the workers failed more often than cluster.max_failures allows, or for good.
        Interrupted: a second signal came.
    """
    with _cluster(job.cfg):
        link = ray.remote(Link).options(num_cpus=0).remote()
        trainer = _trainer(job, link)
        outcome: dict[str, Any] = {}
        fitting = threading.Thread(target=_fit, args=(trainer, outcome), daemon=True)
        with _signals() as received:
            fitting.start()
            told = False
            while fitting.is_alive():
                fitting.join(POLL_SECONDS)
                _pass_on(link, watch)
                if received and not told:
                    told = True
                    link.request_stop.remote()
                    watch({"kind": "stopping", "signal": received[0]})
        _pass_on(link, watch)
        fatal = ray.get(link.fatal.remote())
    if fatal:
        kind, text = fatal
        raise ConfigError(text) if kind == ConfigError.__name__ else TrainingFailedError(text)
    if "error" in outcome:
        raise TrainingFailedError(_reason(outcome["error"])) from outcome["error"]
    return dict(outcome["summary"])


def _pass_on(link: Any, watch: Callable[[Event], None]) -> None:
    for event in ray.get(link.take_events.remote()):
        watch(event)


def _trainer(job: Job, link: Any) -> ray.train.torch.TorchTrainer:
    cluster = job.cfg.cluster
    num_cpus, use_gpu = _cpus_per_worker(job.cfg), _use_gpu(job.cfg)
    return ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job, "link": link, "num_threads": num_cpus},
        torch_config=ray.train.torch.TorchConfig(timeout_s=cluster.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": num_cpus, "GPU": int(use_gpu)},
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(job.run_dir),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[_TellFaults(link)],
        ),
    )


class _TellFaults(ray.train.UserCallback):  # type: ignore[misc]
    """Runs in Ray Train's controller: passes on why workers failed, before they are started again."""

    def __init__(self, link: Any):
        self._link = link

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            self._link.emit.remote({"kind": "warning", "text": f"worker {rank} failed: {_reason(error)}"})


def _fit(trainer: ray.train.torch.TorchTrainer, outcome: dict[str, Any]) -> None:
    """Fit in a thread, so that the driver's main thread can watch and take signals."""
    try:
        outcome["summary"] = trainer.fit().return_value or {}
    except Exception as e:  # raised again by the main thread
        outcome["error"] = e


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray worker runs; in a thread of its own, so it can install no signal handlers."""
    # Late: the driver's and the controller's processes import this module and have no use for these.
    from pipeline.data.dali import BadDataError
    from pipeline.train import NonFiniteLossError, fit

    job, link = config["job"], config["link"]
    if ray.get(link.fatal.remote()):
        return {}
    here = ray.train.get_context()
    context = Context(
        rank=here.get_world_rank(),
        world_size=here.get_world_size(),
        device=ray.train.torch.get_device(),
        num_threads=config["num_threads"],
        emit=lambda event: link.emit.remote(event),
        should_stop=lambda: here.get_world_rank() == 0 and ray.get(link.should_stop.remote()),
    )
    try:
        return fit(job, context)
    except (ConfigError, NonFiniteLossError, BadDataError) as e:  # a restart would meet it again
        ray.get(link.fail.remote(type(e).__name__, str(e)))
        raise


@contextmanager
def _cluster(cfg: Config) -> Iterator[None]:
    """Connect to the cluster that the configuration or $RAY_ADDRESS names, else start one on this machine."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(cfg.cluster.timeout_s))
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(cfg.cluster.timeout_s))
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    common = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with _blocked(ENDING_SIGNALS):
                ray.init(
                    address="local",
                    # More workers than cores is slow but works: Ray's CPUs are slots.
                    num_cpus=max(_cores(), cfg.cluster.workers * (cfg.cluster.cpus_per_worker or 1)),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **common,
                )
    except (ConnectionError, RuntimeError, ValueError) as e:
        where = f"cluster.address={address}" if address else "Ray on this machine"
        raise ConfigError(f"{where} cannot be reached: {str(e).splitlines()[0]}") from None
    started = [] if address else psutil.Process().children(recursive=True)
    try:
        yield
    finally:
        started += [] if address else psutil.Process().children(recursive=True)
        ray.shutdown()
        for leftover in psutil.wait_procs(started, timeout=3)[1]:  # a second Ctrl-C can catch Ray in between
            leftover.kill()


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Keep signals from the processes started inside, which inherit the mask.

    `kill`, `timeout` and batch systems may signal the whole process group; Ray must live until the workers
    have saved a checkpoint. Ray does the same for SIGINT.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collects the name of a first signal to end, for the main loop to act on; a second one raises Interrupted."""
    received: list[str] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise Interrupted
        received.append(signal.Signals(number).name)

    previous = {s: signal.signal(s, handle) for s in ENDING_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _use_gpu(cfg: Config) -> bool:
    """Whether workers get a GPU each.

    Raises:
        ConfigError: fewer GPUs than workers.
    """
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    use = cfg.cluster.device == "gpu" or (cfg.cluster.device == "auto" and num_gpus > 0)
    if use and num_gpus < cfg.cluster.workers:
        raise ConfigError(
            f"cluster.workers={cfg.cluster.workers}: the cluster has {num_gpus} GPUs, and each worker takes one; "
            f"set cluster.workers={max(num_gpus, 1)} or cluster.device=cpu"
        )
    return use


def _cpus_per_worker(cfg: Config) -> int:
    """CPU slots and threads of a worker: what is configured, else an even share of the cluster's."""
    return cfg.cluster.cpus_per_worker or max(1, int(ray.cluster_resources()["CPU"]) // cfg.cluster.workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _reason(error: Exception) -> str:
    """The last line of a failed worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
