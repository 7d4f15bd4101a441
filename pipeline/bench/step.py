"""`pipeline bench step`: how fast the bare step is here, which part of the device's peak that is, and what would help.

A shared machine's speed changes within minutes. So what is compared takes turns, round by round, in one process, and
what counts is the ratio within a round.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.bench.common import batch_per_worker, compare, describe, peak_memory, take_turns, title
from pipeline.bench.planning.assumptions import CARDS
from pipeline.bench.planning.cost_model import count_network
from pipeline.bench.verdict import format_shares, step_verdict
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.data.loading.loader import Batch, LoaderContext
from pipeline.errors import UserError
from pipeline.text import between, columns, figure
from pipeline.tracking.ledger import COMPUTE, TimeLedger, total
from pipeline.training.backends import set_backends
from pipeline.training.compilation import SHORT_STEPS, compiled, decide, missing_tool, num_shapes
from pipeline.training.microbatch import AutoMicrobatch, may_try_out
from pipeline.training.precision import settle
from pipeline.training.state import TrainState
from pipeline.training.step import AUTOCAST, train_step, unmarked
from pipeline.versions import device_name

NUM_CLASSES = 1000
MARKS = 6  # of the ledger, in a step
GEMM = 2048  # rows and columns of the product that shows a CPU's peak
CONFIGURED = "as configured"


class BareStep:
    """Our training step over one batch that lies on the device: no data, no logging, one worker.

    In parts, where the device's memory is short, as a training does it.

    Args:
        cfg: see `settled`.
    """

    def __init__(self, cfg: Config, context: LoaderContext):
        set_backends(cfg.train, context.device)
        self.cfg, self._context = cfg, context
        self.batch = batch_per_worker(cfg)
        self._train = replace(cfg.train, global_batch=self.batch)
        self._state = TrainState.create(cfg, NUM_CLASSES, context.device)
        model, mode = self._state.model, cfg.model.compile
        self._net = model if mode == "none" else compiled(model, mode, num_shapes(cfg))
        size = cfg.data.image_size
        images = torch.randint(0, 256, (self.batch, 3, size, size), dtype=torch.uint8, device=context.device)
        labels = torch.randint(0, NUM_CLASSES, (self.batch,), device=context.device)
        images = images.contiguous(memory_format=torch.channels_last)
        self._batch = Batch(images, labels, np.arange(self.batch))
        began = time.perf_counter()
        fitting = AutoMicrobatch(self._train, may_try_out(cfg, context.device, 1), warn, mode)
        micro_batch = fitting.size(self._state, self._net, self._batch)
        self.is_split = micro_batch < min(cfg.train.micro_batch or self.batch, self.batch)
        self._train = replace(self._train, micro_batch=micro_batch)
        self._time_steps(1)
        self.first_step_s = time.perf_counter() - began  # with whatever is compiled or looked up first

    def measure(self, num_steps: int) -> float:
        """Images/s over so many steps."""
        return num_steps * self.batch / self._time_steps(num_steps)

    def _time_steps(self, num_steps: int, mark: Callable[[str], object] = unmarked) -> float:
        torch.set_num_threads(self._context.num_threads)
        set_backends(self._train, self._context.device)  # variants take turns
        began = time.perf_counter()
        for _ in range(num_steps):
            lr = self.cfg.optim.lr
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


def settled(cfg: Config, device: torch.device) -> Config:
    """With what "auto" becomes in a training that is long enough to be compiled."""
    cfg = settle(cfg, device)
    return decide(cfg, device, missing=[missing_tool(device)], num_steps=SHORT_STEPS).applied_to(cfg)


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
    peak_bytes = 0.0
    for name, cfg in variants.items():
        try:
            steps[name] = BareStep(cfg, context)
        except Exception as e:  # of torch's compiler anything; what does not fit and may not be split
            if name == CONFIGURED:
                raise
            warn(f"{name} is left out: {(str(e).strip().splitlines() or [type(e).__name__])[0]}")
            continue
        peak_bytes = peak_bytes or peak_memory(context.device)  # of the first one alone
        progress(len(steps), len(variants), f"{name}: first step {steps[name].first_step_s:.1f} s")
    measurements = {name: partial(step.measure, num_steps) for name, step in steps.items()}
    per_s = take_turns(measurements, num_rounds, progress, float)
    cfg, configured = variants[CONFIGURED], steps[CONFIGURED]
    macs = count_network(cfg.model, cfg.data.image_size).macs
    rate = float(np.median(per_s[CONFIGURED]))
    peak, origin = _peak_flops(context.device, cfg.train.precision)
    result = {
        **describe_worker(cfg, context, configured.batch, num_rounds, num_steps),
        "rows": compare(per_s, CONFIGURED),
        "first_step_s": {name: step.first_step_s for name, step in steps.items()},
        "parts": configured.share_of_parts(max(2, num_steps)),
        "macs_per_image": macs,
        "tflops": 6 * macs * rate / 1e12,  # two for a multiply-add; the backward pass takes twice the forward's
        "peak_tflops": peak and peak / 1e12,
        "peak_origin": origin,
        "mfu": peak and 6 * macs * rate / peak,
        "peak_memory_gb": peak_bytes / 1e9,
        "ledger_share": MARKS * _seconds_per_mark(context.device) / (configured.batch / rate),
    }
    tried = {name: row for name, row in result["rows"].items() if name != CONFIGURED}
    return result | {"verdict": step_verdict(tried, result["mfu"], origin, num_rounds)}


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
    if "bound" in result:
        lines.append(format_shares(result))
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


def warn(text: str) -> None:
    """For people."""
    print(text, file=sys.stderr)


def describe_worker(cfg: Config, context: LoaderContext, batch: int, num_rounds: int, num_steps: int) -> dict[str, Any]:
    """What was measured, and where."""
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


def _seconds_per_mark(device: torch.device) -> float:
    """Seconds that a mark of the ledger takes."""
    ledger, num_marks = TimeLedger("outside", device), 1000
    began = time.perf_counter()
    for _ in range(num_marks):
        ledger.start_phase("outside")
    return (time.perf_counter() - began) / num_marks
