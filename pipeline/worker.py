"""What each of Ray's workers runs: one rank of a session, and rank 0's line to the driver."""

import os
import threading
import time
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline.config import ConfigError
from pipeline.job import Context, StopReason
from pipeline.link import MAX_WAIT_S


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run `fit` as one rank; Ray calls this in a thread of its own, so it can install no signal handlers."""
    entered = time.time()
    # Late: the driver's and the controller's processes import this module and have no use for these.
    from pipeline.affinity import pin
    from pipeline.checkpoint import CheckpointError
    from pipeline.data.fetch import BadDataError
    from pipeline.evaluate import NonFiniteError
    from pipeline.identity import SupersededError
    from pipeline.train import fit

    job, link, attempt = config["job"], config["link"], config["attempt"]
    here = ray.train.get_context()
    rank = here.get_world_rank()
    link.join.remote(attempt, ray.get_runtime_context().get_node_id())
    line = _Line(link, attempt, job.cfg.cluster.timeout_s)
    if rank == 0:
        threading.Thread(target=line.keep, name="link", daemon=True).start()
    device = ray.train.torch.get_device()
    pin(job.cfg.cluster.pin, device, here.get_local_rank(), here.get_local_world_size(), config["num_threads"])
    context = Context(
        rank=rank,
        world_size=here.get_world_size(),
        device=device,
        num_threads=config["num_threads"],
        emit=lambda event: link.emit.remote(attempt, event),
        stop_reason=lambda: line.stop_reason,
        progress=line.progress,
        faults=config["faults"],
        marks=(*config["marks"], ("processes", entered), ("imports of workers", time.time())),
        restarted=config["restarted"],
    )
    try:
        return fit(job, context)
    except (ConfigError, NonFiniteError, BadDataError, CheckpointError, SupersededError) as e:
        ray.get(link.fail.remote(attempt, type(e).__name__, str(e)))  # a restart would meet it again
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
            if self.stop_reason is not None:
                time.sleep(MAX_WAIT_S)  # the link does not wait any more
