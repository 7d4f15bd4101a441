"""`pipeline bench train`: how fast one worker trains here, beside the bare step, and what holds it back.

Training and the bare step take turns, round by round, in one process: see `bench.step`.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from pipeline.bench.common import batch_per_worker, compare, config_to_measure, peak_memory
from pipeline.bench.step import BareStep, describe_worker, warn
from pipeline.bench.verdict import HostLead, Measured, train_verdict
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.data.loading.loader import LoaderContext
from pipeline.events import BrokenImage, Event, StepLogged, Warned
from pipeline.runs.spec import WorkerContext
from pipeline.text import between
from pipeline.training import open_run
from pipeline.training.loop import fit

PIPELINE, CEILING = "pipeline", "ceiling"


class TrainRounds:
    """The rounds of a training, as its events tell them; after each one the bare step is measured.

    lead: to be told of each step.

    Args:
        cfg: of the training. progress: called after each round.
    """

    def __init__(self, cfg: Config, context: LoaderContext, num_steps: int, progress: Callable[[int, str], None]):
        self._cfg, self._context, self._num_steps, self._progress = cfg, context, num_steps, progress
        self.per_s: dict[str, list[float]] = {PIPELINE: [], CEILING: []}
        self.peak_memory = 0.0  # of the training alone
        self.ceiling: BareStep  # from the end of the first round on, which is for warming up
        self._waits: dict[str, list[float]] = {"data wait": [], "communication wait": []}  # shares of the time
        self._late_shares = list[float]()
        self.lead, self._began, self._seconds = HostLead(context.device), 0.0, dict[str, float]()

    def emit(self, event: Event) -> None:
        """The training tells what happens; it waits while the bare step is measured."""
        if isinstance(event, Warned | BrokenImage):
            warn(event.text)
        # On a GPU a log comes when the steps of the next one are launched. So its seconds are of the round before, and
        # two come with the last step.
        if not isinstance(event, StepLogged) or self.lead.num_steps == 0:
            return
        late_share = self.lead.late_share()  # the round is over when the device has computed what is launched
        seconds = time.perf_counter() - self._began
        if self._seconds:
            self.per_s[PIPELINE].append(self._num_steps * self.ceiling.batch / seconds)
            self.per_s[CEILING].append(self.ceiling.measure(self._num_steps))
            spent = {phase: event.seconds[phase] - self._seconds[phase] for phase in ("compute", *self._waits)}
            for phase, shares in self._waits.items():
                shares.append(spent[phase] / sum(spent.values()))
            self._late_shares += [] if late_share is None else [late_share]
            speeds = ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in self.per_s.items())
            self._progress(len(self.per_s[CEILING]), f"images/s: {speeds}")
        else:
            self.peak_memory = peak_memory(self._context.device)
            self.ceiling = BareStep(self._cfg, self._context)
            self.ceiling.measure(self._num_steps)
        self._began, self._seconds = time.perf_counter(), event.seconds
        self.lead.start()

    def measured(self, ratio: float) -> Measured:
        """What bounds the training, in figures."""
        device = self._context.device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        return Measured(
            ratio,
            data_wait_share=float(np.median(self._waits["data wait"])),
            communication_share=float(np.median(self._waits["communication wait"])),
            host_late_share=float(np.median(self._late_shares)) if self._late_shares else None,
            memory_share=memory and self.peak_memory / memory,
            is_split=self.ceiling.is_split,
        )


def bench_train(
    cfg: Config, context: LoaderContext, num_rounds: int, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Images/s through `fit` (index, DALI, MLflow on SQLite) beside those on synthetic data, one worker, by turns.

    Evaluation and checkpoints are left out, and so is Ray. The loader goes on for `data.prefetch` batches while the
    other is measured, so a round should be a multiple of that.

    Args:
        num_steps: timed in a turn.
    """
    batch = batch_per_worker(cfg)
    with tempfile.TemporaryDirectory() as storage:
        num_warming = 2 if context.device.type == "cuda" else 1  # rounds: there the first log comes after two
        uri, all_steps = f"sqlite:///{storage}/mlflow.db", (num_rounds + num_warming) * num_steps
        cluster = replace(cfg.cluster, workers=1)
        cfg = config_to_measure(cfg, cluster, "bench", storage, uri, batch=batch, steps=all_steps, every=num_steps)
        rounds = TrainRounds(cfg, context, num_steps, lambda done, text: progress(done, num_rounds, text))
        with open_run.open_run(cfg, warn) as spec:
            ctx = WorkerContext(0, 1, context.device, context.num_threads, rounds.emit, progress=rounds.lead.step)
            fit(spec, ctx)
    rows = compare(rounds.per_s, CEILING)
    measured = rounds.measured(rows[PIPELINE]["ratio"])
    verdict = train_verdict(measured, rounds.ceiling.cfg, context)
    quartiles = between(rows[PIPELINE]["ratio_quartiles"], ".3f")
    return {
        **describe_worker(cfg, context, batch, num_rounds, num_steps),
        "rows": rows,
        **asdict(measured),
        "peak_memory_gb": rounds.peak_memory / 1e9,
        "bound": verdict.bound,
        "verdict": f"{measured.ratio:.3f} of the ceiling (quartiles {quartiles}); {verdict.text}",
    }
