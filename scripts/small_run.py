"""The training that `enumerate_faults` disturbs, as one process of it, and what must have come of it at its end.

The driver's preparation and the one rank's work are one process here, without Ray. It is forked from one that has
imported all that it takes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # imported once, and not in each case
import mlflow.system_metrics.system_metrics_monitor  # noqa: F401  # likewise
import torch
import torch._dynamo  # likewise: an optimizer imports it, which takes two seconds
from fast_clock import Clock
from faults import Fault, Seam

from pipeline.cluster import controller, driver
from pipeline.cluster.supervisor import TrainRequest
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.data.loading import reader_process, readers
from pipeline.errors import UserError
from pipeline.events import AttemptStarted, Event, RunOpened, Warned, to_json
from pipeline.failures import FailureBudget, FatalError, attempt_is_repeated, driver_end
from pipeline.runs import checkpoint
from pipeline.runs.async_checkpointer import AsyncCheckpointer
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import Failure as Failure
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.storage import Storage
from pipeline.tracking import sync
from pipeline.training.loop import fit

ROOT = Path(__file__).parent.parent
NAME = "small"
STOP_AT, NUM_STEPS = 4, 8
KEPT = ("step_00000004", "step_00000008")  # in any case: the best and the last
SETTINGS = f"""run.name={NAME} model.depth=18 model.freeze=layer4 train.steps={NUM_STEPS} train.global_batch=10
    train.precision=fp32 train.log_every=2 train.eval_batch=10 optim.warmup_epochs=0.1 checkpoint.every=2
    checkpoint.keep=2 mlflow.log_model=false mlflow.report=false cluster.workers=1 cluster.timeout_s=120
    data.image_size=16 data.val_resize=16 data.read_threads=1 data.decode_threads=1""".split()
SAVE_BOUND_S = 1.5
VARYING = ("perf/", "time/", "checkpoint/", "attempt/")  # metrics whose values are another in each run


def is_fatal(error: BaseException, begun: bool) -> bool:
    """Whether the controller ends the run by it."""
    return isinstance(error, (UserError, FatalError)) and not attempt_is_repeated(type(error).__name__, begun)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case lies.

    folder: of all that the run makes on this machine. data: the images. storage: of runs. control: of what the harness
    notes, which the seam does not see.
    """

    folder: Path
    data: Path
    storage: Storage
    control: Path

    @property
    def run(self) -> Storage:
        return self.storage / NAME

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    @property
    def database(self) -> Path:
        return self.folder / "mlflow" / "mlflow.db"

    def config(self) -> Config:
        given = [f"run.storage={self.storage}", f"mlflow.uri=sqlite:///{self.database}"]
        given += [f"data.train={self.data}/train.arrow", f"data.val={self.data}/val"]
        return load(ROOT / "configs/digits.yaml", [*SETTINGS, *given])

    def roots(self) -> dict[str, tuple[str, str]]:
        """As `Seam` takes them."""
        run = str(self.run) if self.storage.local else self.run._opened[1]
        roots = {run: ("RUN", "storage"), str(Path(run).parent): ("RUNS", "storage")}
        return roots | {str(self.tmp): ("TMP", "scratch"), str(self.data): ("DATA", "data")}


def attempt(
    place: Place, cfg: Config, fault: Fault | None, *, again: bool, begun: bool, faults: tuple[Failure, ...]
) -> None:
    """One process: the driver's preparation, and the rank's work; how it ended goes into control/result.json.

    Args:
        again: an earlier one had begun with this command. begun: it had begun to train, too.
        faults: since then.
    """
    tempfile.tempdir = str(place.tmp)
    sink = os.open(place.control / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    clock = Clock(place.control / "clock.json")
    seam = Seam(place.roots(), fault, clock)
    clock.install()
    seam.install()
    _settle_saves(clock)
    vars(readers)["Child"] = _ThreadChild

    started = heard = False

    def emit(event: Event) -> None:
        nonlocal started, heard
        started, heard = started or isinstance(event, AttemptStarted), True
        os.write(sink, json.dumps(to_json(event), default=str).encode() + b"\n")
        if isinstance(event, Warned):
            print("warning:", event.text, flush=True)

    kind, text = "done", ""
    try:
        request = TrainRequest(cfg, None, FailureBudget(0), faults, again, begun, clock.time())
        with _opened(request, emit) as spec:
            emit(RunOpened(spec.run.name, str(spec.run)))
            marks = (("command", clock.time()), ("run", clock.time()))
            context = WorkerContext(0, 1, torch.device("cpu"), 1, emit, failures=faults, marks=marks, restarted=again)
            try:
                fit(spec, context)
            except Exception as e:
                traceback.print_exc()
                kind, text = "fatal" if is_fatal(e, begun or started) else "raised", f"{type(e).__name__}: {e}"
    except Exception as e:
        traceback.print_exc()
        kind, text = driver_end(e) or ("lost" if heard else "never started"), f"{type(e).__name__}: {e}"
    (place.control / "result.json").write_text(json.dumps({"kind": kind, "text": text}), encoding="utf-8")
    (place.control / "operations.json").write_text(json.dumps(seam.operations), encoding="utf-8")


@contextlib.contextmanager
def _opened(request: TrainRequest, watch: Callable[[Event], None]) -> Iterator[RunSpec]:
    """The run, as the driver opens it; without what would train it on a Ray cluster."""

    def warn(text: str) -> None:
        watch(Warned(text))

    supervisor: Any = SimpleNamespace(request=request, wants_stop=threading.Event(), warn=warn, emit=watch)
    controller.TrainController = lambda *_, **__: None  # type: ignore[assignment, misc]
    with contextlib.ExitStack() as stack:
        with driver._watched(supervisor) as heartbeat:
            spec, _ = stack.enter_context(driver._opened(supervisor, heartbeat))
        yield spec


class _ThreadChild:
    """A process that reads images, as a thread of this one, so that the seam sees what it does."""

    def __init__(self, module: str, pass_fds: Sequence[int] = ()):
        self.connection, theirs = Pipe()
        threading.Thread(target=reader_process.serve, args=[theirs], daemon=True).start()

    def describe_end(self) -> str:
        return "its thread has ended"

    def kill(self) -> None:
        self.connection.close()


def _settle_saves(clock: Clock) -> None:
    """Have each save wait until it is done: how fast a disk is must not choose the steps that are saved."""
    save = AsyncCheckpointer.save

    def settled(checkpointer: AsyncCheckpointer, *state: Any, **options: Any) -> None:
        save(checkpointer, *state, **options)
        began = clock.real_monotonic()
        while checkpointer._writing and not checkpointer._writing.done():
            if clock.since is not None and clock.real_monotonic() - began > SAVE_BOUND_S:
                break
            clock.real_sleep(0.005)

    AsyncCheckpointer.save = settled  # type: ignore[assignment, method-assign]


def end(place: Place) -> dict[str, Any]:
    """What came of a run, after `pipeline sync` for what still waits for MLflow."""
    tempfile.tempdir = str(place.tmp)
    manifest = RunManifest.read(place.run, print)
    _, _, waiting = sync.sync(place.run, print)
    newest = checkpoint.newest_valid(place.run / "checkpoints", print)
    assert newest is not None
    digest = hashlib.sha256()
    _digest(newest.state(), digest)
    store, metrics = sqlite3.connect(place.database), dict[str, Any]()
    rows = store.execute("select key, step, value from metrics where key not like 'system/%' order by key, step")
    for key, step, value in rows:
        metrics.setdefault(key, []).append([step, None if key.startswith(VARYING) else value])
    kept = place.database.parent / "mlartifacts"
    artifacts = [path.relative_to(kept).parts[2:] for path in kept.rglob("*") if path.is_file()]
    return {
        "run.json has ended": manifest is not None and not manifest.open,
        "waiting": waiting,
        "checkpoints": (place.run / "checkpoints").names(),
        "weights": digest.hexdigest(),
        "runs": [status for (status,) in store.execute("select status from runs")],
        "metrics": metrics,
        "artifacts": sorted("/".join(parts) for parts in artifacts if parts and parts[0] != "config"),
    }


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, torch.Tensor):
        into.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            into.update(str(key).encode())
            _digest(value[key], into)
    elif isinstance(value, list | tuple):
        for item in value:
            _digest(item, into)
    else:
        into.update(repr(value).encode())
