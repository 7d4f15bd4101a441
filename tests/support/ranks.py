"""Run a function on several gloo ranks, each a process of its own, without Ray."""

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from pipeline.events import Event, Warned
from pipeline.runs import checkpoint
from pipeline.runs.spec import RunSpec, WorkerContext

FAST = [
    "data.image_size=32",
    "data.val_resize=32",
    "data.crop_scale=[0.7,1.0]",
    "model.depth=18",
    "optim.warmup_epochs=0.5",
    "optim.lr=0.02",
    "train.global_batch=16",
    "train.ema_decay=0.99",
    "train.steps=30",
    "train.log_every=5",
    "checkpoint.every=10",
    "mlflow.log_model=false",
    "mlflow.report=false",
    "mlflow.checkpoints=none",
]

PRELOADED = ["torch", "pipeline.training.loop", "mlflow"]  # by the process that ranks are forked from: seconds for each


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` of every rank, with one thread each; what they return, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(PRELOADED)
        arguments = (dict(os.environ), function, world_size, folder, args)
        start_processes(_rank, arguments, world_size, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int, environ: dict[str, str], function: Callable[..., Any], world_size: int, folder: str, args: Any
) -> None:
    os.environ.clear()  # it is that of the first ranks' time
    os.environ.update(environ)
    warnings.filterwarnings("error", module="pipeline")  # pytest's filters do not reach a child
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), Path(folder) / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def context(rank: int = 0, world_size: int = 1, events: list[Event] | None = None) -> WorkerContext:
    """A CPU rank that hands its events to a list and is never asked to stop."""
    emit = _show if events is None else events.append
    return WorkerContext(rank, world_size, torch.device("cpu"), 1, emit)


def no_bad_image(path: str, reason: str) -> None:
    """For loaders whose images are all sound."""
    pytest.fail(f"{path}: {reason}")


def _show(event: Event) -> None:
    if isinstance(event, Warned):
        print(event.text)


def final_state(spec: RunSpec) -> dict[str, Any]:
    found = checkpoint.newest_valid(spec.checkpoints, pytest.fail)
    assert found is not None
    return found.state()
