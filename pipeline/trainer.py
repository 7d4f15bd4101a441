"""Ray Train's trainer as the driver uses it: one group of workers, watched from the driver's own process.

Ray would run its controller as an actor, whose process needs seconds to import what the driver's has already. It would
also start an actor that asks an autoscaler for the workers' room, which the driver holds by then. What is left out here
is told to Ray by classes that it has for that, but which are not part of its public interface.
"""

import asyncio
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

# Ray Data is not used. Placement groups end with the driver, which made them: they need no cleaner.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(TorchTrainer):  # type: ignore[misc]  # what comes from ray is Any
    """Ray's, for a number of workers that does not change."""

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, UNUSED)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["scaling_policy"] = _FixedSize(self.scaling_config)
        controller = _Controller(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


class _FixedSize(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as configured; nobody is asked for room."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray's; but nothing is reported to Ray, so workers need no controller, and reports no barrier."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        ray.kill(sync_actor)  # an idle process takes part of a core, too
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _WorkerGroup
