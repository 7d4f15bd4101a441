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
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import machine
from pipeline.bench import common
from pipeline.bench.common import about, rows, title, to_measure, turns
from pipeline.bench.planning.cost_model import count_network
from pipeline.cluster import supervisor
from pipeline.cluster.doctor import node_checks
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.errors import UserError
from pipeline.events import AttemptFailed, AttemptStarted, Event, StepLogged, Warned
from pipeline.failures import TrainingFailedError
from pipeline.text import between, columns, figure
from pipeline.tracking.ledger import PHASES
from pipeline.training.precision import with_precision

LOG_EVERY = 5  # steps; what was before the first logged one is warming up
POOR = 0.9
PARTS = {"compute": "compute", "communication": "communication wait", "data": "data wait", "logging": "logging"}
CONNECT_SECONDS = 60.0


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
    share = -(-cfg.train.global_batch // cfg.cluster.max_workers)
    per_s: dict[str, list[float]] = {str(n): [] for n in counts}
    spent: dict[str, list[dict[str, float]]] = {str(n): [] for n in counts}
    startup = list[dict[str, float]]()
    for done, turn in enumerate(turns(counts, num_rounds), 1):
        for n in turn:
            with ExitStack() as opened:
                storage = (
                    cfg.run.storage if joins else opened.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
                )
                start, steps = _train(_to_measure(cfg, n, cores, share, LOG_EVERY + num_steps, storage))
            cfg = with_precision(cfg, start.precision)  # what the first workers have is what all are compared in
            first, last = steps[0].seconds, steps[-1].seconds
            seconds = {phase: last[phase] - first[phase] for phase in PHASES}
            per_s[str(n)].append(num_steps * share * n / sum(seconds[phase] for phase in PARTS.values()))
            spent[str(n)].append(seconds)
            startup.append(start.startup)
        figures_s = ", ".join(f"{name} workers {ones[-1]:.1f}" for name, ones in per_s.items())
        progress(done, num_rounds, f"images/s: {figures_s}")
    found = rows(per_s, "1")
    for name, row in found.items():
        row |= common.spread("efficiency", np.array(per_s[name]) / np.array(per_s["1"]) / int(name))
        row |= {f"{key}_s_per_step": _median(spent[name], phase) / num_steps for key, phase in PARTS.items()}
    result: dict[str, Any] = about(cfg) | {
        "global_batch_per_worker": share,
        "cpus_per_worker": cores,
        "parameters": count_network(cfg.model, cfg.data.image_size).parameters,
        "rounds": num_rounds,
        "steps_per_round": num_steps,
        "workers": found,
        "startup": {name: _median(startup, name) for name in startup[0]},
    }
    if not joins and counts[-1] > 1 and not torch.cuda.is_available():
        result["allreduce_gb_s"] = _link(counts[-1])
    return result | {"verdict": verdict(found)}


def _median(ones: list[dict[str, float]], name: str) -> float:
    return float(np.median([one[name] for one in ones]))


def _to_measure(cfg: Config, num_workers: int, cores: int, share: int, num_steps: int, storage: str) -> Config:
    """Logged to a database of its own."""
    name = f"bench-{num_workers}-{time.strftime('%Y%m%d-%H%M%S')}"
    uri = cfg.mlflow.uri if "://" in storage else f"sqlite:///{Path(storage).absolute()}/bench.db"
    cluster, batch = replace(cfg.cluster, workers=num_workers, cpus_per_worker=cores), share * num_workers
    return to_measure(cfg, cluster, name, storage, uri, batch=batch, steps=num_steps, every=LOG_EVERY)


def _train(cfg: Config) -> tuple[AttemptStarted, list[StepLogged]]:
    """Train; the events of the start and of the logged steps."""
    starts, steps = list[AttemptStarted](), list[StepLogged]()

    def watch(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            starts.append(event)
        elif isinstance(event, StepLogged):
            steps.append(event)
        elif isinstance(event, Warned | AttemptFailed):
            print(event.text, file=sys.stderr)

    if supervisor.train(cfg, "bench", None, watch)["status"] == "interrupted":
        raise KeyboardInterrupt
    if len(starts) != 1:
        raise TrainingFailedError("a failure interrupted the measurement; run it again")
    return starts[0], steps


def _link(num_workers: int) -> float:
    """GB/s that each of so many processes here sends at while their gradients are summed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        where = f"file://{folder}/rendezvous"
        reduce = partial(node_checks.all_reduce, "gloo", where, num_workers=num_workers, patience_s=CONNECT_SECONDS)
        seconds = max(pool.map(reduce, range(num_workers)))
    return 2 * (num_workers - 1) / num_workers * node_checks.ALL_REDUCE_BYTES / seconds / 1e9


def verdict(found: dict[str, Any]) -> str:
    """How well the most workers do, and what keeps them from doing better."""
    most = str(max(map(int, found)))
    one, many = found["1"], found[most]
    if most == "1":
        return "one worker alone says nothing of scaling; give --workers 1,2"
    low, high = many["efficiency_quartiles"]
    text = f"{most} workers attain {many['efficiency']:.1%} of {most} times one's speed ({low:.1%} to {high:.1%})"
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


def table(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [
        f"{title(result)}, batch {result['global_batch_per_worker']} and {result['cpus_per_worker']} cores for each "
        f"worker; {result['rounds']} rounds of {result['steps_per_round']} steps, by turns; median and quartiles",
    ]
    rows = [("workers", "images/s", "efficiency", "quartiles", *PARTS)]
    for name, row in result["workers"].items():
        efficiency = figure(row["efficiency"], ".3f"), between(row["efficiency_quartiles"], ".3f")
        parts = [f"{1000 * row[f'{part}_s_per_step']:.1f} ms" for part in PARTS]
        rows.append((name, figure(row["images_per_s"], ".1f"), *efficiency, *parts))
    lines += columns(rows, "<>><>>>>")
    lines.append("start-up: " + ", ".join(f"{name} {s:.1f} s" for name, s in result["startup"].items()))
    if "allreduce_gb_s" in result:
        lines.append(f"an all-reduce sends {result['allreduce_gb_s']:.2f} GB/s from each worker")
    return [*lines, result["verdict"]]
