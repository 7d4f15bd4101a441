"""`pipeline bench step|train`: how fast one worker trains here, beside what it could, and what holds it back.

A shared machine's speed changes within minutes. So what is compared takes turns, round by round, in one process, and
what counts is the ratio within a round.
"""

import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.bench.common import batch_per_worker, compare, config_to_measure, describe, take_turns, title
from pipeline.bench.planning.assumptions import CARDS
from pipeline.bench.planning.cost_model import count_network
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.data.loading.loader import Batch, LoaderContext
from pipeline.errors import UserError
from pipeline.events import BrokenImage, Event, StepLogged, Warned
from pipeline.runs.spec import WorkerContext
from pipeline.text import between, columns, figure
from pipeline.tracking.ledger import COMPUTE, TimeLedger, total
from pipeline.training import open_run
from pipeline.training.compilation import SHORT_STEPS, compiled, decide, missing_tool
from pipeline.training.loop import fit
from pipeline.training.state import TrainState
from pipeline.training.step import AUTOCAST, train_step, unmarked
from pipeline.versions import device_name

NUM_CLASSES = 1000
MARKS = 6  # of the ledger, in a step
GEMM = 2048  # rows and columns of the product that shows a CPU's peak
NOISE = 0.03  # a gain below this is none
FEW = 5  # rounds
CONFIGURED, PIPELINE, CEILING = "as configured", "pipeline", "ceiling"


class BareStep:
    """Our training step over one batch that lies on the device: no data, no logging, one worker."""

    def __init__(self, cfg: Config, context: LoaderContext):
        self._cfg, self._context = cfg, context
        self.batch = batch_per_worker(cfg)
        self._train = replace(cfg.train, global_batch=self.batch)
        self._state = TrainState.create(cfg, NUM_CLASSES, context.device)
        missing = [missing_tool(context.device)]
        mode = decide(cfg, context.device, missing=missing, num_steps=SHORT_STEPS).mode
        self._net = self._state.model if mode == "none" else compiled(self._state.model, mode)
        size = cfg.data.image_size
        images = torch.randint(0, 256, (self.batch, 3, size, size), dtype=torch.uint8, device=context.device)
        labels = torch.randint(0, NUM_CLASSES, (self.batch,), device=context.device)
        images = images.contiguous(memory_format=torch.channels_last)
        self._batch = Batch(images, labels, np.arange(self.batch))
        self.first_step_s = self._time_steps(1)  # with whatever is compiled or looked up first

    def measure(self, num_steps: int) -> float:
        """Images/s over so many steps."""
        return num_steps * self.batch / self._time_steps(num_steps)

    def _time_steps(self, num_steps: int, mark: Callable[[str], object] = unmarked) -> float:
        torch.set_num_threads(self._context.num_threads)
        began = time.perf_counter()
        for _ in range(num_steps):
            lr = self._cfg.optim.lr
            loss = train_step(self._state, self._net, self._batch, self._train, lr=lr, world_size=1, mark=mark)
        loss.item()
        return time.perf_counter() - began

    def share_of_parts(self, num_steps: int) -> dict[str, float]:
        """Each part's share of so many steps."""
        ledger = TimeLedger("outside", self._context.device)
        self._time_steps(num_steps, ledger.start_phase)
        ledger.start_phase("outside")
        seconds = ledger.seconds()
        return {part: seconds[part] / total(seconds, *COMPUTE) for part in COMPUTE}


def have_same_step(a: Config, b: Config) -> bool:
    """Whether both have the same bare step, the workers' number and the images' size among it."""
    first, second = ((c.model, c.train, c.optim, c.data.image_size, c.cluster.max_workers) for c in (a, b))
    return first == second


def bench_step(
    variants: dict[str, Config], context: LoaderContext, num_rounds: int, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Images/s on synthetic data of each variant, by turns.

    Args:
        variants: configurations by what they change; the first one changes nothing.
        num_steps: timed in a turn.
    """
    steps = dict[str, BareStep]()
    peak_memory = 0.0
    for name, cfg in variants.items():
        steps[name] = BareStep(cfg, context)
        peak_memory = peak_memory or _peak_memory(context.device)  # of the first one alone
        progress(len(steps), len(variants), f"{name}: first step {steps[name].first_step_s:.1f} s")
    measurements = {name: partial(step.measure, num_steps) for name, step in steps.items()}
    per_s = take_turns(measurements, num_rounds, progress, float)
    cfg, configured = variants[CONFIGURED], steps[CONFIGURED]
    macs = count_network(cfg.model, cfg.data.image_size).macs
    rate = float(np.median(per_s[CONFIGURED]))
    peak, origin = _peak_flops(context.device, cfg.train.precision)
    result = {
        **_describe(cfg, context, configured.batch, num_rounds, num_steps),
        "rows": compare(per_s, CONFIGURED),
        "first_step_s": {name: step.first_step_s for name, step in steps.items()},
        "parts": configured.share_of_parts(max(2, num_steps)),
        "macs_per_image": macs,
        "tflops": 6 * macs * rate / 1e12,  # two for a multiply-add; the backward pass takes twice the forward's
        "peak_tflops": peak and peak / 1e12,
        "peak_origin": origin,
        "mfu": peak and 6 * macs * rate / peak,
        "peak_memory_gb": peak_memory / 1e9,
        "ledger_share": MARKS * _seconds_per_mark(context.device) / (configured.batch / rate),
    }
    return result | {"verdict": step_verdict(result)}


def bench_train(
    cfg: Config, context: LoaderContext, num_rounds: int, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Images/s through `fit` (index, DALI, MLflow on SQLite) beside those on synthetic data, one worker, by turns.

    Evaluation and checkpoints are left out, and so is Ray. The loader goes on for `data.prefetch` batches while the
    other is measured, so a round should be a multiple of that.

    Args:
        num_steps: timed in a turn.
    """
    per_s: dict[str, list[float]] = {PIPELINE: [], CEILING: []}
    wait_shares = list[float]()  # of the time, spent waiting for data
    ceiling: BareStep | None = None
    round_began, waited_before = 0.0, 0.0

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    def emit(event: Event) -> None:
        nonlocal round_began, waited_before, ceiling
        if isinstance(event, Warned | BrokenImage):
            warn(event.text)
        if not isinstance(event, StepLogged):
            return
        seconds, waited = time.perf_counter() - round_began, event.seconds["data wait"]
        if ceiling is None:  # the first round is for warming up
            ceiling = BareStep(cfg, context)
            ceiling.measure(num_steps)
        else:
            per_s[PIPELINE].append(num_steps * batch / seconds)
            per_s[CEILING].append(ceiling.measure(num_steps))
            wait_shares.append((waited - waited_before) / seconds)
            speeds = ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in per_s.items())
            progress(len(wait_shares), num_rounds, f"images/s: {speeds}")
        round_began, waited_before = time.perf_counter(), waited

    batch = batch_per_worker(cfg)
    with tempfile.TemporaryDirectory() as storage:
        uri, all_steps = f"sqlite:///{storage}/mlflow.db", (num_rounds + 1) * num_steps
        cluster = replace(cfg.cluster, workers=1)
        cfg = config_to_measure(cfg, cluster, "bench", storage, uri, batch=batch, steps=all_steps, every=num_steps)
        with open_run.open_run(cfg, warn) as spec:
            fit(spec, WorkerContext(0, 1, context.device, context.num_threads, emit))
    result = {
        **_describe(cfg, context, batch, num_rounds, num_steps),
        "rows": compare(per_s, CEILING),
        "shares": {"data wait": float(np.median(wait_shares))},
        "peak_memory_gb": _peak_memory(context.device) / 1e9,
    }
    return result | {"verdict": train_verdict(result)}


def step_verdict(result: dict[str, Any]) -> str:
    """What bounds a step, and which of the variants helps most."""
    tried = {name: row for name, row in result["rows"].items() if name != CONFIGURED}
    gains = {name: row["ratio"] for name, row in tried.items() if row["ratio_quartiles"][0] > 1 + NOISE}
    mfu = result["mfu"]
    if mfu is None:
        text = "the device's peak is not known, so neither is what bounds a step"
    elif mfu >= 0.5:
        text = f"arithmetic bounds a step: it attains {mfu:.0%} of the peak"
    else:
        text = (
            f"memory bounds a step, and what lies between the convolutions: it attains {mfu:.0%} of the peak "
            f"({result['peak_origin']})"
        )
    if result["rounds"] < FEW:
        return f"{text}; fewer than {FEW} rounds do not say which of the settings tried helps"
    if not gains:
        return f"{text}; none of the settings tried helps"
    best = max(gains, key=lambda name: float(gains[name]))
    return f"{text}; {best} helps most: {gains[best]:.2f} times"


def train_verdict(result: dict[str, Any]) -> str:
    """How near to the ceiling, and what keeps it from there."""
    row = result["rows"][PIPELINE]
    text = f"{row['ratio']:.3f} of the ceiling (quartiles {between(row['ratio_quartiles'], '.3f')})"
    wait = result["shares"]["data wait"]
    if wait > NOISE:
        return (
            f"{text}; data bounds training: {wait:.0%} of it is waiting for images; raise data.decode_threads or "
            "data.prefetch, or give the worker more cores; `pipeline bench loader` says how fast the loader can be"
        )
    return f"{text}; computing bounds training; `pipeline bench step --try KEY=VALUE` says what makes that faster"


def format_result(result: dict[str, Any]) -> list[str]:
    """For people."""
    rows = [("", "images/s", "quartiles", "ratio", "quartiles")]
    for name, row in result["rows"].items():
        speed = figure(row["images_per_s"], ".1f"), between(row["images_per_s_quartiles"], ".1f")
        rows.append((name, *speed, figure(row["ratio"], ".3f"), between(row["ratio_quartiles"], ".3f")))
    lines = [
        f"{title(result)}, batch {result['batch']} on {result['device']}, {result['threads']} threads; "
        f"{result['rounds']} rounds of {result['steps_per_round']} steps, by turns; median and quartiles",
        *columns(rows, "<><>"),
    ]
    if "parts" in result:
        lines.append("of a step: " + ", ".join(f"{part} {share:.0%}" for part, share in result["parts"].items()))
        mfu = "not known" if result["mfu"] is None else f"{result['mfu']:.1%} of {result['peak_tflops']:.2f} TFLOP/s"
        lines.append(
            f"{result['tflops']:.3f} TFLOP/s, {mfu} ({result['peak_origin']}); the ledger takes "
            f"{result['ledger_share']:.4%} of a step"
        )
    return [*lines, f"peak memory {result['peak_memory_gb']:.2f} GB", result["verdict"]]


def context_here(num_threads: int | None) -> LoaderContext:
    """This machine's device, for one worker.

    Raises:
        UserError: more threads than cores.
    """
    context = LoaderContext.here()
    if num_threads and num_threads > context.num_threads:
        raise UserError(f"--threads {num_threads}: this process may use {context.num_threads} cores; lower it")
    return replace(context, num_threads=num_threads or context.num_threads)


def _describe(cfg: Config, context: LoaderContext, batch: int, num_rounds: int, num_steps: int) -> dict[str, Any]:
    place = {"batch": batch, "device": device_name(context.device), "threads": context.num_threads}
    return {**describe(cfg), **place, "rounds": num_rounds, "steps_per_round": num_steps}


def _peak_flops(device: torch.device, precision: str) -> tuple[float | None, str]:
    """FLOP/s that the device can do at most, and how that is known."""
    if device.type == "cuda":
        words = re.split(r"[ -]", torch.cuda.get_device_name())
        card = next((name for name in CARDS if name in words), None)
        if card is None or precision == "fp32":
            return None, "not in the table"
        return CARDS[card].peak_tflops * 1e12, f"data sheet of {card}"
    a = torch.randn(GEMM, GEMM, dtype=AUTOCAST[precision])
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * GEMM**3 / min(seconds), f"a product of {GEMM}x{GEMM} matrices here"


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _seconds_per_mark(device: torch.device) -> float:
    """Seconds that a mark of the ledger takes."""
    ledger, num_marks = TimeLedger("outside", device), 1000
    began = time.perf_counter()
    for _ in range(num_marks):
        ledger.start_phase("outside")
    return (time.perf_counter() - began) / num_marks
