"""Ray Train's trainer as the driver uses it: one group of workers, watched from the driver's own process.

Ray would run its controller as an actor, whose process needs seconds to import what the driver's has already. It would
also start an actor that asks an autoscaler for the workers' room, which the driver holds by then, and one for barriers
over all ranks. And its way to set up torch has the driver import torch. What is left out here is told to Ray by classes
that it has for that, but which are not part of its public interface.
"""

import asyncio
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.train import Result
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus, state, worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup

from pipeline.failures import NoGpuError

POLL_S = 5.0  # a worker that has ended is seen at once; this is for Ray's own troubles
ENDING_POLL_S = 1.0  # once one has ended, since Ray may not have known it the first time
SETTLE_S = 0.1  # from the end of a worker's training, or of its process, until Ray knows
LEAVE_S = 5.0  # for a group that has failed to take its leave, before it is killed: a frozen one never does
# Ranks that connect to each other at once: one that dies before the first collective is then noticed at once, too.
MAX_MESH = 64
# What torch says of a driver that is too old or missing, and of a torch for CPUs.
NO_DRIVER = ("driver on your system is too old", "Found no NVIDIA driver", "not compiled with CUDA")
# Ray Data is not used. Placement groups end with the driver, which made them: they need no cleaner.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class _NoBarrier:
    """In place of Ray's actor for barriers in `ray.train.report`: nothing is reported to Ray."""

    @classmethod
    def options(cls, **_: Any) -> type["_NoBarrier"]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> "_NoBarrier":
        return cls()


worker_group.SynchronizationActor = _NoBarrier
state._shutdown_sync_actor = lambda _: None


@dataclass
class TorchConfig(BackendConfig):  # type: ignore[misc]  # what comes from ray is Any
    """torch's process group, as Ray's class of this name sets it up, but the driver imports no torch for it."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchBackend

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _TorchBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        ranks = range(len(worker_group))
        address, port = worker_group.execute_single(0, get_address_and_port)
        # One that imports torch slowly is not to keep the others waiting.
        worker_group.execute(_prepare, address, port, backend_config.backend, len(ranks))
        group = {"world_size": len(ranks), **backend_config.to_dict()}
        ray.get([worker_group.execute_single_async(i, _join_group, world_rank=i, **group) for i in ranks])

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        leaving = worker_group.execute_async(_leave_group)
        ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S)


def _prepare(address: str, port: int, backend: str, world_size: int) -> None:
    """On a worker: import torch, and set what it reads.

    Raises:
        NoGpuError: it is to use a GPU, and never can. RuntimeError: it cannot now.
    """
    import torch
    from ray.train.torch.config import _set_torch_distributed_env_vars

    if backend == "nccl":
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as e:
            reason = str(e).strip().partition(". ")[0]
            # Another attempt may find a card that has come up late, but no other driver.
            kind = NoGpuError if any(words in reason for words in NO_DRIVER) else RuntimeError
            raise kind(
                f"torch {torch.__version__} cannot use the GPU of {socket.gethostname()} ({reason}); `pipeline doctor` "
                "says what to install, or set cluster.device=cpu"
            ) from None
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    # torch's own default; Ray's is 1, by which an aborted communicator may let a rank go on with what is not summed.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    if world_size > MAX_MESH:  # else each rank connects to all others at once, though a collective needs few of them
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    _set_torch_distributed_env_vars()


def _join_group(*, world_rank: int, world_size: int, backend: str, timeout_s: int) -> None:
    """On a worker."""
    from ray.train.torch.config import _setup_torch_process_group

    _setup_torch_process_group(backend, world_rank, world_size, "env://", timeout_s)


def _leave_group() -> None:
    """On a worker."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray's, for a number of workers that does not change.

    Args:
        group: the room for the workers, one bundle for each.
        ended: set once a worker has ended, whichever way: Ray then looks at them at once.
    """

    def __init__(self, *args: Any, group: PlacementGroup, ended: threading.Event, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._group, self._ended = group, ended

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, UNUSED)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["scaling_policy"] = _FixedSize(self.scaling_config)
        controller = _Controller(**arguments)
        controller.ended = self._ended
        controller.worker_group_cls = type("_PlacedWorkerGroup", (_WorkerGroup,), {"group": self._group})
        asyncio.run(controller.run())
        return controller.get_result()


class _FixedSize(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as configured; nobody is asked for room."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    group: PlacementGroup

    def _create_placement_group(self, *_: Any) -> DefaultPlacementGroupHandle:
        return DefaultPlacementGroupHandle(self.group)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        """None of their own, for which Ray would start each twice: they have their node's variables and the job's."""
        return {}

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray's; but nothing is reported to Ray, so workers need no controller, and reports no barrier."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    ended: threading.Event
    _pause_s = POLL_S

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        """As Ray's, which sleeps between two looks; here nothing else runs in this thread's loop."""
        if self.ended.wait(self._pause_s):
            self.ended.clear()
            self._pause_s = ENDING_POLL_S
            time.sleep(SETTLE_S)
        self._latest_poll_time = 0.0
        return await super()._poll_workers()
