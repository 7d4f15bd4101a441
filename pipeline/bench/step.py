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
from typing import Any

import numpy as np
import torch

from pipeline.bench.common import about, rows, title, to_measure, turns
from pipeline.bench.planning.assumptions import CARDS
from pipeline.bench.planning.cost_model import count_network
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.data.loading.loader import Batch, LoaderContext
from pipeline.errors import UserError
from pipeline.events import Event, StepLogged, Warned
from pipeline.runs.spec import WorkerContext
from pipeline.text import between, columns, figure
from pipeline.tracking.ledger import COMPUTE, TimeLedger, total
from pipeline.training import open_run
from pipeline.training.ddp import compiled
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


class Stepper:
    """Our training step over one batch that lies on the device: no data, no logging, one worker."""

    def __init__(self, cfg: Config, place: LoaderContext):
        self._cfg, self._context = cfg, place
        self.batch = -(-cfg.train.global_batch // cfg.cluster.max_workers)
        self._train = replace(cfg.train, global_batch=self.batch)
        self._state = TrainState.create(cfg, NUM_CLASSES, place.device)
        self._net = self._state.model if cfg.model.compile == "none" else compiled(self._state.model, cfg.model.compile)
        size = cfg.data.image_size
        images = torch.randint(0, 256, (self.batch, 3, size, size), dtype=torch.uint8, device=place.device)
        labels = torch.randint(0, NUM_CLASSES, (self.batch,), device=place.device)
        images = images.contiguous(memory_format=torch.channels_last)
        self._batch = Batch(images, labels, np.arange(self.batch))
        self.first_step_s = self.seconds(1)  # with whatever is compiled or looked up first
        self.ledger = TimeLedger("outside", place.device)

    def seconds(self, num_steps: int, mark: Callable[[str], object] = unmarked) -> float:
        """That so many steps take."""
        torch.set_num_threads(self._context.num_threads)
        began = time.perf_counter()
        for _ in range(num_steps):
            lr = self._cfg.optim.lr
            loss = train_step(self._state, self._net, self._batch, self._train, lr=lr, world_size=1, mark=mark)
        loss.item()
        return time.perf_counter() - began

    def parts(self, num_steps: int) -> dict[str, float]:
        """Each part's share of so many steps."""
        self.seconds(num_steps, self.ledger.start_phase)
        self.ledger.start_phase("outside")
        seconds = self.ledger.seconds()
        return {part: seconds[part] / total(seconds, *COMPUTE) for part in COMPUTE}


def same_step(one: Config, other: Config) -> bool:
    """Whether both have the same bare step, the workers' number and the images' size among it."""
    parts = [(c.model, c.train, c.optim, c.data.image_size, c.cluster.max_workers) for c in (one, other)]
    return parts[0] == parts[1]


def bench_step(
    variants: dict[str, Config], place: LoaderContext, num_rounds: int, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Images/s on synthetic data of each variant, by turns.

    Args:
        variants: configurations by what they change; the first one changes nothing.
        num_steps: timed in a turn.
    """
    steppers = dict[str, Stepper]()
    peak_memory = 0.0
    for name, cfg in variants.items():
        steppers[name] = Stepper(cfg, place)
        peak_memory = peak_memory or _peak_memory(place.device)  # of the first one alone
        progress(len(steppers), len(variants), f"{name}: first step {steppers[name].first_step_s:.1f} s")
    per_s: dict[str, list[float]] = {name: [] for name in steppers}
    for done, turn in enumerate(turns(list(steppers.items()), num_rounds), 1):
        for name, one in turn:
            per_s[name].append(one.batch * num_steps / one.seconds(num_steps))
        progress(done, num_rounds, ", ".join(f"{n} {s[-1]:.1f} images/s" for n, s in per_s.items()))
    cfg, first = variants[CONFIGURED], steppers[CONFIGURED]
    macs = count_network(cfg.model, cfg.data.image_size).macs
    rate = float(np.median(per_s[CONFIGURED]))
    peak, origin = _peak(place.device, cfg.train.precision)
    result = {
        **_about(cfg, place, first.batch),
        "rounds": num_rounds,
        "steps_per_round": num_steps,
        "rows": rows(per_s, CONFIGURED),
        "first_step_s": {name: one.first_step_s for name, one in steppers.items()},
        "parts": first.parts(max(2, num_steps)),
        "macs_per_image": macs,
        "tflops": 6 * macs * rate / 1e12,  # two for a multiply-add; the backward pass takes twice the forward's
        "peak_tflops": peak and peak / 1e12,
        "peak_origin": origin,
        "mfu": peak and 6 * macs * rate / peak,
        "peak_memory_gb": peak_memory / 1e9,
        "ledger_share": MARKS * _mark_s(place.device) / (first.batch / rate),
    }
    return result | {"verdict": step_verdict(result)}


def bench_train(
    cfg: Config, place: LoaderContext, num_rounds: int, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Images/s through `fit` (index, DALI, MLflow on SQLite) beside those on synthetic data, one worker, by turns.

    Evaluation and checkpoints are left out, and so is Ray. The loader goes on for `data.prefetch` batches while the
    other is measured, so a round should be a multiple of that.

    Args:
        num_steps: timed in a turn.
    """
    per_s: dict[str, list[float]] = {PIPELINE: [], CEILING: []}
    shares = list[float]()  # of the time, spent waiting for data
    ceiling: Stepper | None = None
    since, before = 0.0, 0.0

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    def watch(event: Event) -> None:
        nonlocal since, before, ceiling
        if isinstance(event, Warned):
            warn(event.text)
        if not isinstance(event, StepLogged):
            return
        passed, waited = time.perf_counter() - since, event.seconds["data wait"]
        if ceiling is None:  # the first round is for warming up
            ceiling = Stepper(cfg, place)
            ceiling.seconds(num_steps)
        else:
            per_s[PIPELINE].append(num_steps * ceiling.batch / passed)
            per_s[CEILING].append(num_steps * ceiling.batch / ceiling.seconds(num_steps))
            shares.append((waited - before) / passed)
            figures = ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in per_s.items())
            progress(len(shares), num_rounds, f"images/s: {figures}")
        since, before = time.perf_counter(), waited

    batch = -(-cfg.train.global_batch // cfg.cluster.max_workers)
    with tempfile.TemporaryDirectory() as storage:
        uri, all_steps = f"sqlite:///{storage}/mlflow.db", (num_rounds + 1) * num_steps
        one = replace(cfg.cluster, workers=1)
        cfg = to_measure(cfg, one, "bench", storage, uri, batch=batch, steps=all_steps, every=num_steps)
        with open_run.open_run(cfg, warn) as job:
            fit(job, WorkerContext(0, 1, place.device, place.num_threads, watch))
    result = {
        **_about(cfg, place, batch),
        "rounds": num_rounds,
        "steps_per_round": num_steps,
        "rows": rows(per_s, CEILING),
        "shares": {"data wait": float(np.median(shares))},
        "peak_memory_gb": _peak_memory(place.device) / 1e9,
    }
    return result | {"verdict": train_verdict(result)}


def step_verdict(result: dict[str, Any]) -> str:
    """What bounds a step, and which of the variants helps most."""
    gains = {n: one for n, one in result["rows"].items() if n != CONFIGURED and one["ratio_quartiles"][0] > 1 + NOISE}
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
    best = max(gains, key=lambda n: float(gains[n]["ratio"]))
    return f"{text}; {best} helps most: {gains[best]['ratio']:.2f} times"


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


def table(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [
        f"{title(result)}, batch {result['batch']} on {result['device']}, {result['threads']} threads; "
        f"{result['rounds']} rounds of {result['steps_per_round']} steps, by turns; median and quartiles",
    ]
    rows = [("", "images/s", "quartiles", "ratio", "quartiles")]
    for name, row in result["rows"].items():
        speed = figure(row["images_per_s"], ".1f"), between(row["images_per_s_quartiles"], ".1f")
        rows.append((name, *speed, figure(row["ratio"], ".3f"), between(row["ratio_quartiles"], ".3f")))
    lines += columns(rows, "<><>")
    if "parts" in result:
        lines.append("of a step: " + ", ".join(f"{part} {share:.0%}" for part, share in result["parts"].items()))
        mfu = "not known" if result["mfu"] is None else f"{result['mfu']:.1%} of {result['peak_tflops']:.2f} TFLOP/s"
        lines.append(
            f"{result['tflops']:.3f} TFLOP/s, {mfu} ({result['peak_origin']}); the ledger takes "
            f"{result['ledger_share']:.4%} of a step"
        )
    return [*lines, f"peak memory {result['peak_memory_gb']:.2f} GB", result["verdict"]]


def here(num_threads: int | None) -> LoaderContext:
    """This machine's device, for one worker.

    Raises:
        UserError: more threads than cores.
    """
    place = LoaderContext.here()
    if num_threads and num_threads > place.num_threads:
        raise UserError(f"--threads {num_threads}: this process may use {place.num_threads} cores; lower it")
    return replace(place, num_threads=num_threads or place.num_threads)


def _about(cfg: Config, place: LoaderContext, batch: int) -> dict[str, Any]:
    return about(cfg) | {"batch": batch, "device": device_name(place.device), "threads": place.num_threads}


def _peak(device: torch.device, precision: str) -> tuple[float | None, str]:
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


def _mark_s(device: torch.device) -> float:
    """Seconds that a mark of the ledger takes."""
    ledger, num_marks = TimeLedger("outside", device), 1000
    began = time.perf_counter()
    for _ in range(num_marks):
        ledger.start_phase("outside")
    return (time.perf_counter() - began) / num_marks
