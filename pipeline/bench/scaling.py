"""`pipeline bench scale`: whole trainings through Ray with more and more workers, and what more of them bring.

Each worker has the same share of the cores and of the batch, however many there are, so that the work grows with the
workers. The numbers of workers take turns, round by round: a shared machine's speed changes within minutes.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import machine
from pipeline.bench.common import batch_per_worker, compare, config_to_measure, describe, spread, take_turns, title
from pipeline.bench.planning.cost_model import count_network
from pipeline.cluster import supervisor
from pipeline.cluster.doctor import node_checks
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.errors import UserError
from pipeline.events import AttemptFailed, AttemptStarted, BrokenImage, Event, StepLogged, Warned
from pipeline.failures import TrainingFailedError
from pipeline.text import between, columns, figure
from pipeline.tracking.ledger import PHASES
from pipeline.training.precision import with_precision

LOG_EVERY = 5  # steps; what was before the first logged one is warming up
POOR = 0.9
PARTS = {"compute": "compute", "communication": "communication wait", "data": "data wait", "logging": "logging"}
CONNECT_TIMEOUT_S = 60.0


class Measurement(NamedTuple):
    """Of one training: seconds: by phase, from the first logged step to the last. startup: seconds of its parts."""

    images_per_s: float
    seconds: dict[str, float]
    startup: dict[str, float]


def bench_scale(
    cfg: Config, workers: Sequence[int], num_rounds: int, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Images/s, and where a step's time goes, by the number of workers.

    On a cluster that is joined, the runs are left in run.storage, as bench-...

    Args:
        workers: the numbers to try; 1 is always among them.
        num_steps: timed in a round, rounded up to a multiple of LOG_EVERY.

    Raises:
        UserError: what a training raises, and a joined cluster without cluster.cpus_per_worker.
        TrainingFailedError: one ended by itself.
        KeyboardInterrupt: one was interrupted.
    """
    counts = sorted({1, *workers})
    num_steps = -(-num_steps // LOG_EVERY) * LOG_EVERY
    joins = bool(cfg.cluster.address or os.environ.get("RAY_ADDRESS"))
    cores = cfg.cluster.cpus_per_worker
    if joins and cores is None:
        raise UserError("cluster.cpus_per_worker=null: one worker would get more cores than two; set it")
    num_cores = machine.cpu_count()
    cores = cores or max(1, num_cores // counts[-1])
    if not joins and counts[-1] * cores > num_cores:
        room = num_cores // cores
        raise UserError(f"--workers {counts[-1]}: with {cores} cores each, this machine has room for {room}")
    batch = batch_per_worker(cfg)

    def measure(num_workers: int) -> Measurement:
        nonlocal cfg
        with nullcontext(cfg.run.storage) if joins else tempfile.TemporaryDirectory(prefix="bench-") as storage:
            start, steps = _train(_config(cfg, num_workers, cores, batch, LOG_EVERY + num_steps, storage))
        cfg = with_precision(cfg, start.precision)  # what the first workers have is what all are compared in
        first, last = steps[0].seconds, steps[-1].seconds
        seconds = {phase: last[phase] - first[phase] for phase in PHASES}
        images = num_steps * batch * num_workers
        return Measurement(images / sum(seconds[phase] for phase in PARTS.values()), seconds, start.startup)

    rounds = take_turns(
        {str(n): partial(measure, n) for n in counts}, num_rounds, progress, lambda m: m.images_per_s, " workers"
    )
    per_s = {name: [m.images_per_s for m in measured] for name, measured in rounds.items()}
    rows = compare(per_s, "1")
    for name, row in rows.items():
        row |= spread("efficiency", np.array(per_s[name]) / np.array(per_s["1"]) / int(name))
        medians = _medians([m.seconds for m in rounds[name]])
        row |= {f"{part}_s_per_step": medians[phase] / num_steps for part, phase in PARTS.items()}
    result: dict[str, Any] = describe(cfg) | {
        "global_batch_per_worker": batch,
        "cpus_per_worker": cores,
        "parameters": count_network(cfg.model, cfg.data.image_size).parameters,
        "rounds": num_rounds,
        "steps_per_round": num_steps,
        "workers": rows,
        "startup": _medians([m.startup for measured in rounds.values() for m in measured]),
    }
    if not joins and counts[-1] > 1 and not torch.cuda.is_available():
        result["allreduce_gb_s"] = _measure_all_reduce(counts[-1])
    return result | {"verdict": verdict(rows)}


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([values[name] for values in measured])) for name in measured[0]}


def _config(cfg: Config, num_workers: int, cores: int, batch: int, num_steps: int, storage: str) -> Config:
    """Logged to a database of its own."""
    name = f"bench-{num_workers}-{time.strftime('%Y%m%d-%H%M%S')}"
    uri = cfg.mlflow.uri if "://" in storage else f"sqlite:///{Path(storage).absolute()}/bench.db"
    cluster = replace(cfg.cluster, workers=num_workers, cpus_per_worker=cores)
    return config_to_measure(
        cfg, cluster, name, storage, uri, batch=batch * num_workers, steps=num_steps, every=LOG_EVERY
    )


def _train(cfg: Config) -> tuple[AttemptStarted, list[StepLogged]]:
    """Train; the events of the start and of the logged steps."""
    starts, steps = list[AttemptStarted](), list[StepLogged]()

    def emit(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            starts.append(event)
        elif isinstance(event, StepLogged):
            steps.append(event)
        elif isinstance(event, Warned | BrokenImage | AttemptFailed):
            print(event.text, file=sys.stderr)

    if supervisor.train(cfg, "bench", None, emit)["status"] == "interrupted":
        raise KeyboardInterrupt
    if len(starts) != 1:
        raise TrainingFailedError("a failure interrupted the measurement; run it again")
    return starts[0], steps


def _measure_all_reduce(num_workers: int) -> float:
    """GB/s that each of so many processes here sends at while their gradients are summed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        rendezvous = f"file://{folder}/rendezvous"
        reduce = partial(
            node_checks.all_reduce, "gloo", rendezvous, num_workers=num_workers, timeout_s=CONNECT_TIMEOUT_S
        )
        seconds = max(pool.map(reduce, range(num_workers)))
    return 2 * (num_workers - 1) / num_workers * node_checks.ALL_REDUCE_BYTES / seconds / 1e9


def verdict(rows: dict[str, Any]) -> str:
    """How well the most workers do, and what keeps them from doing better."""
    most = str(max(map(int, rows)))
    one, many = rows["1"], rows[most]
    if most == "1":
        return "one worker alone says nothing of scaling; give --workers 1,2"
    quartiles = between(many["efficiency_quartiles"], ".1%")
    text = f"{most} workers attain {many['efficiency']:.1%} of {most} times one's speed ({quartiles})"
    if many["efficiency"] >= POOR:
        return text
    costs = {part: many[f"{part}_s_per_step"] - one[f"{part}_s_per_step"] for part in PARTS}
    worst = max(costs, key=lambda part: costs[part])
    fixes = {
        "compute": "each computes more slowly beside the others: cores, caches and memory bandwidth are shared, and "
        "on CPUs summing gradients takes them, too; give fewer workers more cores each (cluster.workers)",
        "communication": "waiting for the others' gradients; try cluster.gradients=bf16, another cluster.bucket_mb, "
        "or a larger batch for each worker",
        "data": "waiting for images; raise data.decode_threads or data.prefetch, or give workers more cores",
        "logging": "logging; raise train.log_every",
    }
    return f"{text}; of what a step takes longer, most is {worst} ({1000 * costs[worst]:.0f} ms): {fixes[worst]}"


def format_result(result: dict[str, Any]) -> list[str]:
    """For people."""
    rows = [("workers", "images/s", "efficiency", "quartiles", *PARTS)]
    for name, row in result["workers"].items():
        efficiency = figure(row["efficiency"], ".3f"), between(row["efficiency_quartiles"], ".3f")
        parts = [f"{1000 * row[f'{part}_s_per_step']:.1f} ms" for part in PARTS]
        rows.append((name, figure(row["images_per_s"], ".1f"), *efficiency, *parts))
    lines = [
        f"{title(result)}, batch {result['global_batch_per_worker']} and {result['cpus_per_worker']} cores for each "
        f"worker; {result['rounds']} rounds of {result['steps_per_round']} steps, by turns; median and quartiles",
        *columns(rows, "<>><>>>>"),
        "start-up: " + ", ".join(f"{name} {s:.1f} s" for name, s in result["startup"].items()),
    ]
    if "allreduce_gb_s" in result:
        lines.append(f"an all-reduce sends {result['allreduce_gb_s']:.2f} GB/s from each worker")
    return [*lines, result["verdict"]]
