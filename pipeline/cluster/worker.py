"""What each of Ray's workers runs: one rank of an attempt."""

import faulthandler
import os
import time
from typing import Any

import ray
import ray.train

from pipeline.cluster.channel import DriverConnection
from pipeline.environment import leave_out_unusable_kernels
from pipeline.errors import UserError
from pipeline.events import Warned
from pipeline.failures import FatalError, StoppedWaitingError
from pipeline.runs.spec import WorkerContext

STDERR = 2


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run `fit` as one rank; Ray calls this in a thread of its own, so it can install no signal handlers."""
    entered = time.time()
    # Else each rank starts as many compilers as the node has cores. Read when torch's compiler is imported.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(config["num_threads"]))
    # Late: the driver imports this module, and starts faster without torch.
    import torch
    from ray.train.torch import get_device

    from pipeline.cluster.affinity import pin_threads
    from pipeline.training.loop import fit

    spec, here = config["spec"], ray.train.get_context()
    rank, node, timeout_s = here.get_world_rank(), ray.get_runtime_context().get_node_id(), spec.cfg.cluster.timeout_s
    driver = DriverConnection(**config["channel"], timeout_s=timeout_s, attempt=config["attempt"], rank=rank, node=node)
    faulthandler.enable(driver, all_threads=False)
    text = leave_out_unusable_kernels(os.environ)  # its own node's
    if text and here.get_local_rank() == 0:
        driver.emit(Warned(text))
    try:
        device = get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        pin_threads(
            spec.cfg.cluster.cpu_affinity,
            device,
            here.get_local_rank(),
            here.get_local_world_size(),
            config["num_threads"],
        )
        context = WorkerContext(
            rank=rank,
            world_size=here.get_world_size(),
            device=device,
            num_threads=config["num_threads"],
            emit=driver.emit,
            stop_reason=lambda: driver.stop_reason,
            progress=driver.progress,
            failures=config["failures"],
            marks=(*config["marks"], ("processes", entered), ("imports of workers", time.time())),
            restarted=config["restarted"],
            deaths=config["deaths"],
        )
        return fit(spec, context)
    except (UserError, FatalError, StoppedWaitingError) as e:
        driver.fail(type(e).__name__, str(e))
        raise
    finally:
        faulthandler.enable(STDERR, all_threads=False)  # before another file has the socket's number
        driver.close(timeout_s)
