"""What bounds a training: from figures to a verdict, and how a late host is measured, on a GPU that a test pretends."""

import dataclasses
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT

from pipeline.bench import train
from pipeline.bench.common import compare
from pipeline.bench.step import settled
from pipeline.bench.verdict import FULL, MOST, MUCH, NOISE, HostLead, Measured, bound_of, train_verdict
from pipeline.config.loading import load
from pipeline.data.loading.loader import LoaderContext
from pipeline.events import StepLogged
from pipeline.training.compilation import SHORT_STEPS, decide

DIGITS = ROOT / "configs/digits.yaml"
ON_CPU = LoaderContext(0, 1, torch.device("cpu"), 8)
ON_GPU = LoaderContext(0, 1, torch.device("cuda", 0), 8)
QUICK = Measured(1.0, 0.0, 0.0, host_late_share=None, memory_share=None, is_split=False)  # on a CPU
BUSY = dataclasses.replace(QUICK, host_late_share=0.0, memory_share=0.5)  # a GPU that nothing waits for
ABOVE = 0.001


@pytest.mark.parametrize(
    ("measured", "bound"),
    [
        ({}, "compute"),
        ({"ratio": 0.5}, "compute"),
        ({"data_wait_share": NOISE}, "compute"),
        ({"data_wait_share": NOISE + ABOVE}, "data"),
        ({"communication_share": NOISE}, "compute"),
        ({"communication_share": NOISE + ABOVE}, "network"),
        ({"data_wait_share": 0.1, "communication_share": 0.2}, "network"),
        ({"data_wait_share": 0.2, "communication_share": 0.1}, "data"),
        ({"host_late_share": MOST}, "compute"),
        ({"host_late_share": MOST + ABOVE}, "host"),
        ({"host_late_share": MOST, "data_wait_share": NOISE + ABOVE}, "data"),
        ({"host_late_share": 1.0, "data_wait_share": MUCH}, "host"),
        ({"host_late_share": 1.0, "data_wait_share": MUCH + ABOVE}, "data"),
        ({"host_late_share": 1.0, "communication_share": MUCH + ABOVE}, "network"),
        ({"memory_share": FULL - ABOVE}, "compute"),
        ({"memory_share": FULL}, "memory"),
        ({"memory_share": 0.5, "is_split": True}, "memory"),
        ({"is_split": True, "host_late_share": 1.0}, "memory"),
        ({"is_split": True, "data_wait_share": NOISE + ABOVE}, "data"),
    ],
)
def test_figures_tell_what_bounds_a_training(measured: dict[str, Any], bound: str) -> None:
    assert bound_of(dataclasses.replace(BUSY, **measured)) == bound


def test_on_a_cpu_what_is_not_waiting_is_computing() -> None:
    assert bound_of(dataclasses.replace(QUICK, ratio=0.5)) == "compute"
    assert bound_of(dataclasses.replace(QUICK, data_wait_share=NOISE + ABOVE)) == "data"


def text_of(measured: Measured, context: LoaderContext, *overrides: str) -> str:
    cfg = load(DIGITS, ["train.precision=fp32", "model.compile=none", *overrides])
    return train_verdict(measured, cfg, context).text


DATA = dataclasses.replace(BUSY, data_wait_share=0.2)
LATE = dataclasses.replace(BUSY, host_late_share=0.93)
SPLIT = dataclasses.replace(BUSY, is_split=True)


@pytest.mark.parametrize(
    ("measured", "context", "overrides", "words"),
    [
        (DATA, ON_CPU, [], "data bounds training: 20% of it is waiting for images; all cores decode, so give"),
        (DATA, ON_CPU, ["data.decode_threads=8"], "all cores decode"),
        (DATA, ON_CPU, ["data.decode_threads=7"], "; set data.decode_threads=8; `pipeline bench loader` says"),
        (DATA, ON_GPU, ["data.decode_threads=5"], "; set data.decode_threads=6;"),
        (DATA, ON_GPU, ["data.decode_threads=6"], "; set data.read_processes=2;"),
        (DATA, ON_GPU, ["data.decode_on_gpu=false"], "; set data.decode_on_gpu=true;"),
        (LATE, ON_GPU, [], "the GPU ended 93% of the steps as soon as they were launched"),
        (LATE, ON_GPU, ["model.compile=default"], "; set model.compile=reduce-overhead,"),
        (LATE, ON_GPU, ["model.compile=max-autotune"], "; raise train.global_batch"),
        (LATE, ON_GPU, ["train.micro_batch=16"], "; raise train.micro_batch"),
        (LATE, ON_GPU, ["model.activation_checkpointing=true"], "; raise train.global_batch"),
        (SPLIT, ON_GPU, [], "computed in parts; try model.activation_checkpointing=true"),
        (SPLIT, ON_GPU, ["model.compile=default"], "; raise cluster.workers"),
        (dataclasses.replace(BUSY, memory_share=0.97), ON_GPU, [], "its peak is 97% of the GPU's"),
        (
            dataclasses.replace(BUSY, memory_share=0.97),
            ON_GPU,
            ["model.activation_checkpointing=true"],
            "; lower train.micro_batch",
        ),
        (dataclasses.replace(BUSY, communication_share=0.1), ON_GPU, [], "; set cluster.gradients=bf16"),
        (
            dataclasses.replace(BUSY, communication_share=0.1),
            ON_GPU,
            ["cluster.gradients=bf16"],
            "10% of it is waiting for other workers' gradients; raise train.global_batch",
        ),
        (QUICK, ON_CPU, [], "computing bounds training; give the worker more cores"),
        (QUICK, ON_CPU, ["train.precision=bf16"], "; try train.precision=fp32"),
        (BUSY, ON_GPU, [], "; try model.compile=default: `pipeline bench step --try model.compile=default` says"),
        (BUSY, ON_GPU, ["model.compile=default"], "; try train.precision=bf16"),
        (BUSY, ON_GPU, ["model.compile=default", "train.precision=bf16"], "; raise cluster.workers"),
        (
            dataclasses.replace(BUSY, ratio=0.8),
            ON_GPU,
            ["model.compile=default", "train.precision=bf16"],
            "; set data.decode_on_gpu=false",
        ),
    ],
)
def test_the_verdict_names_the_setting_that_helps(
    measured: Measured, context: LoaderContext, overrides: list[str], words: str
) -> None:
    assert words in text_of(measured, context, *overrides)


def test_a_setting_that_is_named_goes_with_the_others() -> None:
    """What the verdict says to set is no error, and not what is set already."""
    blocking = ["model.activation_checkpointing=true", "model.sync_bn=true", "train.deterministic=true"]
    step_settings = [["model.compile=default"], ["model.compile=reduce-overhead"], [], *([key] for key in blocking)]
    for given, precision, micro_batch in product(step_settings, ["fp32", "bf16"], ["null", "16"]):
        if "model.compile=reduce-overhead" in given and micro_batch == "16":
            continue  # is refused
        overrides = ["model.compile=none", *given, f"train.micro_batch={micro_batch}"]
        overrides += [f"train.precision={precision}", f"cluster.gradients={precision}"]
        cfg = load(DIGITS, overrides)
        for measured in (DATA, LATE, SPLIT, BUSY, dataclasses.replace(BUSY, communication_share=0.1, ratio=0.5)):
            text = train_verdict(measured, cfg, ON_GPU).text
            for setting in {word.strip(";:,`") for word in text.split() if "=" in word}:
                changed = load(DIGITS, [*overrides, setting])
                assert changed != cfg, text
                decide(changed, ON_GPU.device, missing=[""], num_steps=SHORT_STEPS)


@dataclass
class PretendedGpu:
    """Two clocks, in seconds: the host's, and when the GPU will have computed what is launched.

    queue: so many kernels may wait; then a launch does, too.
    """

    queue: int
    host: float = 5.0
    device: float = 0.0
    waiting: deque[float] = field(default_factory=deque)

    def launch(self, host_s: float, device_s: float) -> None:
        self.host += host_s
        if len(self.waiting) == self.queue:
            self.host = max(self.host, self.waiting.popleft())
        self.device = max(self.device, self.host) + device_s
        self.waiting.append(self.device)

    def event(self, enable_timing: bool) -> "PretendedEvent":
        assert enable_timing
        return PretendedEvent(self)


@dataclass
class PretendedEvent:
    gpu: PretendedGpu
    at: float = 0.0

    def record(self) -> None:
        self.at = max(self.gpu.device, self.gpu.host)

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end: "PretendedEvent") -> float:
        return 1000 * (end.at - self.at)


def pretend(monkeypatch: pytest.MonkeyPatch, queue: int = 1024) -> PretendedGpu:
    gpu = PretendedGpu(queue)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    return gpu


MS = 1e-3


@pytest.mark.parametrize(
    ("launch_ms", "kernel_ms", "wait_ms", "queue", "late"),
    [
        (0.020, 0.005, 0, 1024, 1.0),  # small kernels, each launched when the one before is long over
        (0.020, 0.050, 0, 1024, 0.0),  # the host gets ahead
        (0.020, 0.050, 0, 100, 0.0),  # as far as the queue lets it: it then launches no quicker than the GPU computes
        (0.020, 0.050, 40, 1024, 0.0),  # data come late, and the host does not
        (0.020, 0.005, 5, 1024, 1.0),  # both
    ],
)
def test_a_host_is_late_where_the_gpu_follows_it_at_once(
    monkeypatch: pytest.MonkeyPatch, launch_ms: float, kernel_ms: float, wait_ms: float, queue: int, late: float
) -> None:
    gpu = pretend(monkeypatch, queue=queue)
    lead = HostLead(torch.device("cuda"))
    for number in range(2):  # rounds
        lead.start()
        for done in range(10):
            gpu.host += wait_ms * MS
            for _ in range(500):
                gpu.launch(launch_ms * MS, kernel_ms * MS)
            gpu.launch(0.05 * MS, 0.2 * MS)  # the optimizer's, after which the GPU is busy for a moment
            lead.step(10 * number + done)
        assert lead.num_steps == 10
        assert lead.late_share() == late
        assert gpu.host == pytest.approx(gpu.device), "it was waited for"


def test_steps_that_a_pause_of_the_host_makes_late_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 10 ms, launched in 5; a pause of 30 in the fifth one uses up the lead."""
    gpu = pretend(monkeypatch)
    lead = HostLead(torch.device("cuda"))
    for done in range(1, 11):
        for _ in range(100):
            gpu.launch(0.05 * MS, 0.1 * MS)
        if done == 5:
            gpu.host += 30 * MS
        lead.step(done)
    assert lead.late_share() == 0.1


def test_on_a_cpu_steps_are_counted_alone() -> None:
    lead = HostLead(torch.device("cpu"))
    lead.step(1)
    assert (lead.num_steps, lead.late_share()) == (1, None)
    lead.start()
    assert lead.num_steps == 0


def test_rounds_are_told_apart_where_logs_come_late(digits: Path) -> None:
    """As on a GPU: the first log comes after two rounds, the last two at once; the second has no steps of its own."""
    settings = ["model.depth=18", "data.image_size=32", "train.global_batch=4", "train.precision=fp32"]
    cfg = load(None, [f"data.train={digits}/train", f"data.val={digits}/val", *settings])
    told = list[int]()
    rounds = train.TrainRounds(
        settled(cfg, ON_CPU.device), dataclasses.replace(ON_CPU, num_threads=1), 2, lambda done, _: told.append(done)
    )

    def log(number: int) -> None:
        seconds = {"compute": 50.0 + 6.0 * number, "data wait": 3.0 * number, "communication wait": 1.0 * number}
        rounds.emit(StepLogged(2 * number, {}, seconds | {"logging": 99.0 * number}))

    for number in range(1, 5):
        rounds.lead.step(2 * number - 1)
        rounds.lead.step(2 * number)
        if number > 1:
            log(number - 1)
    log(4)
    assert told == [1, 2]
    measured = rounds.measured(compare(rounds.per_s, train.CEILING)[train.PIPELINE]["ratio"])
    assert (measured.data_wait_share, measured.communication_share) == (0.3, 0.1)
    assert (measured.host_late_share, measured.memory_share, measured.is_split) == (None, None, False)
