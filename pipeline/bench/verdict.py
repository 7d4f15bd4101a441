"""What bounds a step or a training, out of what was measured, and the one setting that helps."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch

from pipeline.config.data import DataConfig
from pipeline.config.schema import Config
from pipeline.config.training import GRAPH_MODES
from pipeline.data.loading.loader import LoaderContext

NOISE = 0.03  # a gain or a wait below this is none
FEW = 5  # rounds
MUCH = 0.2  # a wait above this is none that a late host makes by itself
LATE = 0.1  # of a step
MOST = 0.5  # of the steps
FULL = 0.95  # of the GPU's memory

Bound = Literal["data", "network", "memory", "host", "compute"]


@dataclass(frozen=True)
class Measured:
    """Of a training.

    ratio: its speed as a share of the bare step's. data_wait_share, communication_share: of the time, waiting for
    images and for other workers' gradients. host_late_share: of the steps, see `HostLead`; None: on a CPU, where the
    thread that launches is the one that computes. memory_share: the peak, of the GPU's memory; None: on a CPU.
    is_split: a micro-batch was halved until it fitted.
    """

    ratio: float
    data_wait_share: float
    communication_share: float
    host_late_share: float | None
    memory_share: float | None
    is_split: bool


@dataclass(frozen=True)
class Verdict:
    """bound: what bounds the training. text: how that shows, and the setting that helps."""

    bound: Bound
    text: str


class HostLead:
    """How far the host is ahead of the GPU when it has launched a step.

    A host that launches kernels faster than the GPU computes them gets ahead, by a good part of a step or more. One
    that is slower is caught up with again and again: the GPU comes to the end of a step as soon as the host has
    launched it, and stands still in between. So the delay between the two is what tells. What does not tell:
    - The time that launching takes. Where CUDA's queue is full, a launch waits for the GPU, and busily, so that a quick
      host takes as long as the GPU does.
    - The ledger. A GPU that waits for its next kernel is between two marks of "forward", and counts as computing.
    - Whether the GPU has nothing to do just when a step is launched. The optimizer's few large kernels keep it busy for
      a moment, also where all others came late.

    It takes an event and a reading of a clock for each step, and waits for nothing. On a CPU it counts the steps alone.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._launched: list[tuple[float, Any]] = []
        self._start = self._mark()

    def start(self) -> None:
        """Begin a round; the GPU has nothing to do, so that its clock and the host's begin together."""
        self._launched.clear()
        self._start = self._mark()

    def step(self, step: int) -> None:
        """All of a step's kernels are launched; called as `WorkerContext.progress`."""
        self._launched.append(self._mark())

    @property
    def num_steps(self) -> int:
        """Steps of this round."""
        return len(self._launched)

    def late_share(self) -> float | None:
        """The share of the round's steps that the host was late with. On a GPU this waits for all that is launched."""
        if not self._on_gpu:
            return None
        self._launched[-1][1].synchronize()
        host_began, device_began = self._start
        host = [at - host_began for at, _ in self._launched]
        return late_share(host, [device_began.elapsed_time(event) / 1000 for _, event in self._launched])

    def _mark(self) -> tuple[float, Any]:
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        return time.perf_counter(), event


def late_share(host: Sequence[float], device: Sequence[float]) -> float:
    """The share of the steps that the device ended as soon as the host had launched them.

    Args:
        host, device: when each came to the steps' ends, in seconds since both began.
    """
    soon = LATE * device[-1] / len(device)
    return fmean(ended - launched < soon for launched, ended in zip(host, device, strict=True))


def format_shares(measured: Mapping[str, Any]) -> str:
    """For people: what is waited for, of the fields of `Measured`."""
    for_images, for_workers, late = (measured[f"{name}_share"] for name in ("data_wait", "communication", "host_late"))
    text = f"of the time, waiting for images {for_images:.1%}, for other workers {for_workers:.1%}"
    return text if late is None else f"{text}; the host is late with {late:.0%} of the steps"


def step_verdict(tried: Mapping[str, dict[str, Any]], mfu: float | None, peak_origin: str, num_rounds: int) -> str:
    """What bounds a step, and which setting helps most.

    Args:
        tried: of each setting the gain, as `compare` gives it.
        mfu: the share of the device's peak that the step attains as configured; None: the peak is not known.
        peak_origin: how the peak is known.
    """
    gains = {name: row["ratio"] for name, row in tried.items() if row["ratio_quartiles"][0] > 1 + NOISE}
    if mfu is None:
        text = "the device's peak is not known, so neither is what bounds a step"
    elif mfu >= 0.5:
        text = f"arithmetic bounds a step: it attains {mfu:.0%} of the peak"
    else:
        text = (
            f"memory bounds a step, and what lies between the convolutions: it attains {mfu:.0%} of the peak "
            f"({peak_origin})"
        )
    if num_rounds < FEW:
        return f"{text}; fewer than {FEW} rounds do not say which of the settings tried helps"
    if not gains:
        return f"{text}; none of the settings tried helps"
    best = max(gains, key=lambda name: float(gains[name]))
    return f"{text}; {best} helps most: {gains[best]:.2f} times"


def train_verdict(measured: Measured, cfg: Config, context: LoaderContext) -> Verdict:
    """What bounds a training, and the setting that helps.

    Args:
        cfg: with what "auto" became.
        context: the worker's device, and its threads.
    """
    bound, on_gpu = bound_of(measured), context.device.type == "cuda"
    if bound == "data":
        fix = _data_fix(cfg.data, on_gpu, context.num_threads)
        text = (
            f"data bounds training: {measured.data_wait_share:.0%} of it is waiting for images; {fix}; "
            "`pipeline bench loader` says how fast the loader can be"
        )
    elif bound == "network":
        text = (
            f"the network bounds training: {measured.communication_share:.0%} of it is waiting for other workers' "
            f"gradients; {_network_fix(cfg)}"
        )
    elif bound == "memory":
        how = "a worker's share of the batch does not fit, and is computed in parts"
        if not measured.is_split:
            how = f"its peak is {measured.memory_share:.0%} of the GPU's"
        text = f"memory bounds training: {how}; {_memory_fix(cfg, measured.is_split)}"
    elif bound == "host":
        text = (
            f"the host bounds training: the GPU ended {measured.host_late_share:.0%} of the steps as soon as they were "
            f"launched, and waited for kernels; {_host_fix(cfg)}"
        )
    else:
        text = f"computing bounds training; {_compute_fix(measured.ratio, cfg, on_gpu)}"
    return Verdict(bound, text)


def bound_of(measured: Measured) -> Bound:
    """What a training would have to have more of.

    What is waited for comes first: no GPU and no host makes images arrive. A late host takes some of the loader's time
    for itself, in which the GPU has nothing to do and the ledger counts waiting for data; so there only a long wait
    counts. Memory comes before the host: what is computed in parts has more launches, and CUDA's memory that has to be
    given back and asked for again makes launches wait.
    """
    is_late = (measured.host_late_share or 0.0) > MOST
    waits: dict[Bound, float] = {"data": measured.data_wait_share, "network": measured.communication_share}
    longest = max(waits, key=lambda bound: waits[bound])
    if waits[longest] > (MUCH if is_late else NOISE):
        return longest
    if measured.is_split or (measured.memory_share or 0.0) >= FULL:
        return "memory"
    return "host" if is_late else "compute"


def _data_fix(cfg: DataConfig, on_gpu: bool, num_threads: int) -> str:
    """What loading has not been given yet."""
    most = max(1, num_threads - (2 if on_gpu else 0))  # see `make_loaders`
    if cfg.decode_threads is not None and cfg.decode_threads < most:
        return f"set data.decode_threads={most}"
    if not on_gpu:
        return "all cores decode, so give the worker more (cluster.cpus_per_worker)"
    if not cfg.decode_on_gpu:
        return "set data.decode_on_gpu=true"
    return f"set data.read_processes={2 * cfg.read_processes}"


def _network_fix(cfg: Config) -> str:
    if cfg.cluster.gradients == "fp32":
        return "set cluster.gradients=bf16"
    return "raise train.global_batch, so that each worker computes more for what it sends"


def _memory_fix(cfg: Config, is_split: bool) -> str:
    if not cfg.model.activation_checkpointing and cfg.model.compile == "none":
        return _to_try("model.activation_checkpointing=true")
    return "raise cluster.workers, so that each has a smaller share" if is_split else "lower train.micro_batch"


def _host_fix(cfg: Config) -> str:
    """Fewer launches, or more work in each."""
    if cfg.train.micro_batch is not None:
        return "raise train.micro_batch"
    if cfg.model.compile not in GRAPH_MODES and _may_compile(cfg):
        return "set model.compile=reduce-overhead, which launches CUDA graphs"
    return "raise train.global_batch, or lower cluster.workers"


def _compute_fix(ratio: float, cfg: Config, on_gpu: bool) -> str:
    if not on_gpu:
        if cfg.train.precision != "fp32":  # some CPUs with bf16 are faster without: docs/performance.md
            return _to_try("train.precision=fp32")
        return "give the worker more cores (cluster.cpus_per_worker)"
    if cfg.model.compile == "none" and _may_compile(cfg):
        return _to_try("model.compile=default")
    if cfg.train.precision == "fp32":
        return _to_try("train.precision=bf16")
    if ratio < 1 - NOISE and cfg.data.decode_on_gpu:
        return "set data.decode_on_gpu=false: the GPU does something beside the step, and decoding is the most of that"
    return "raise cluster.workers"


def _may_compile(cfg: Config) -> bool:
    """Whether no other setting is against it, see `compilation.decide`."""
    return not (cfg.model.activation_checkpointing or cfg.model.sync_bn or cfg.train.deterministic)


def _to_try(setting: str) -> str:
    return f"try {setting}: `pipeline bench step --try {setting}` says what it brings"
