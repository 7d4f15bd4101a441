"""A configuration's images/s, hours, goodput and cost on a number of GPUs, on paper.

A model small enough to check by hand: a step is the slowest rank's arithmetic and what of the all-reduce does not hide
behind it, unless images cannot be read or decoded so fast; a run is its steps, and what failures cost.
docs/performance.md says how far to trust it.
"""

import math
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bench.planning.assumptions import Assumptions
from pipeline.bench.planning.failure_model import FailureModel, FloatArray
from pipeline.config.schema import Config
from pipeline.config.training import ModelConfig
from pipeline.errors import UserError
from pipeline.models.resnet import ResNet

RESNET50_MACS, RESNET50_ELEMENTS = 4.089e9, 11.11e6  # an image of 224 pixels, forward


@dataclass(frozen=True)
class ModelCost:
    """macs: multiply-adds of one image, forward. elements: that its convolutions write. layers: kernels, about."""

    parameters: int
    macs: float
    elements: float
    layers: int


@dataclass(frozen=True)
class Scenario:
    """What a prediction is of. batch_per_gpu: weak scaling; None keeps the recipe's global batch. rate: images/s of
    one GPU alone, where it is known."""

    cfg: Config
    assumed: Assumptions
    model: ModelCost
    images: int
    batch_per_gpu: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Row:
    """A prediction for one number of GPUs. step_s is the largest of the three after it; `parts` add up to work_s."""

    gpus: int
    global_batch: int
    step_s: float
    work_s: float
    read_s: float
    decode_s: float
    parts: dict[str, float]
    images_per_s: float
    efficiency: float
    goodput: float
    hours: float
    cost: float
    bound: str


def count_network(model: ModelConfig, image_size: int, num_classes: int = 1000) -> ModelCost:
    """Count our own model on torch's meta device, which computes shapes alone."""
    written, layers = 0, 0

    def count(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal written, layers
        written += out.numel() if isinstance(module, torch.nn.Conv2d) else 0
        layers += 1

    with torch.device("meta"):
        net = ResNet(model, num_classes).eval()  # BatchNorm refuses a single value a channel in training
        for module in net.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, image_size, image_size))
    parameters = sum(p.numel() for p in net.parameters())
    return ModelCost(parameters, counter.get_total_flops() / 2, written, layers)


def card_rate(net: ModelCost, precision: str, a: Assumptions) -> float:
    """Images/s of one GPU alone, at a large batch: the published A100's, in proportion to memory bandwidth.

    ResNets write and read much for little arithmetic. By bandwidth alone a T4 would keep 0.36 of a V100's speed in AMP
    inference (published: 0.35), and a V100 0.44 of an A100's in training (published: 0.49); by their peaks 0.52 and
    0.40. Other depths and sizes cost the mean of their multiply-adds' and their written elements' ratios.
    """
    work = (net.macs / RESNET50_MACS + net.elements / RESNET50_ELEMENTS) / 2
    by_memory = a.resnet50_images_s * a.memory_gb_s / a.resnet50_memory_gb_s / work
    by_peak = a.peak_share * a.peak_tflops * 1e12 / (6 * net.macs)  # backward costs twice the forward pass
    return min(by_memory, by_peak) * (a.fp32_speed if precision == "fp32" else 1)


def compute_s(batch: float, rate: float, floor_s: float) -> float:
    """A pass over `batch` images: arithmetic and launching kernels hide each other, but not quite.

    The root of the sum of squares meets NVIDIA's published latencies (V100, AMP, ResNet-50) within 7% from batch 1 to
    256. Half the rate is attained at a batch of floor_s * rate / sqrt(3).
    """
    return math.hypot(batch / rate, floor_s)


def expected_max(num_ranks: int) -> float:
    """Of so many standard normal numbers, about (Blom 1958): 0 for one, 3.2 for 1,024."""
    return NormalDist().inv_cdf((num_ranks - 0.375) / (num_ranks + 0.25))


def between_nodes_gb_s(a: Assumptions) -> float:
    """What an all-reduce attains of a node's links.

    Over TCP, NCCL has one interface of a pod and one socket a channel: more or faster links do not help.
    """
    attained = a.network_gb_s * a.link_share
    return attained if a.rdma else min(attained, a.tcp_gb_s)


def all_reduce_s(num_ranks: int, num_bytes: float, a: Assumptions) -> float:
    """A ring inside each node and one between them; each sends 2 (n - 1) / n of the bytes."""
    inside = min(num_ranks, int(a.gpus_per_node))
    nodes = -(-num_ranks // int(a.gpus_per_node))
    seconds = 2 * (inside - 1) / inside * num_bytes / (a.link_gb_s * a.link_share * 1e9)
    seconds += 2 * (nodes - 1) / nodes * num_bytes / (between_nodes_gb_s(a) * 1e9)
    hops = 2 * (inside - 1) + 2 * math.ceil(math.log2(nodes))
    return seconds + num_buckets(num_bytes, a) * hops * a.latency_us * 1e-6


def num_buckets(num_bytes: float, a: Assumptions) -> int:
    return math.ceil(num_bytes / (a.bucket_mb * 1e6))


def exposed_s(all_reduce: float, buckets: int, backward_s: float, a: Assumptions) -> float:
    """What of an all-reduce steps wait for: the last bucket, and what the backward pass before it is too short for."""
    last = all_reduce / buckets
    return last + max(0.0, all_reduce - last - a.overlap * backward_s * (buckets - 1) / buckets)


def split_batch(scenario: Scenario, gpus: int) -> tuple[int, int]:
    """The global batch, and the largest share of it.

    Raises:
        UserError: fewer images than GPUs.
    """
    unit, per_gpu = 2 if scenario.cfg.data.mixes else 1, scenario.batch_per_gpu
    if per_gpu and per_gpu % unit:
        raise UserError(f"--batch-per-gpu {per_gpu}: must be even, for pairs of data.mixup or data.cutmix")
    total = per_gpu * gpus if per_gpu else scenario.cfg.train.global_batch
    if total < gpus * unit:
        raise UserError(
            f"--gpus {gpus}: train.global_batch={total} gives some of them nothing; ask for at most {total // unit}, "
            "or give --batch-per-gpu"
        )
    return total, -(-total // unit // gpus) * unit


def predict(scenario: Scenario, gpus: int) -> Row:
    """The row of a number of GPUs."""
    cfg, a = scenario.cfg, scenario.assumed
    total, share = split_batch(scenario, gpus)
    rate = scenario.rate or card_rate(scenario.model, cfg.train.precision, a)
    passes = -(-share // (cfg.train.micro_batch or share))
    arithmetic_s = share / rate
    launched_s = passes * compute_s(share / passes, rate, scenario.model.layers * a.launch_us * 1e-6)
    per_node = int(a.gpus_per_node)
    fullness = (min(gpus, per_node) - 1) / max(per_node - 1, 1)
    shared_s = launched_s / (1 - (1 - a.full_node) * fullness)
    num_bytes = scenario.model.parameters * a.grad_bytes
    backward_s = shared_s / passes * 2 / 3
    parts = {
        "arithmetic": arithmetic_s,
        "launching kernels": launched_s - arithmetic_s,
        "full nodes": shared_s - launched_s,
        "stragglers": shared_s * a.jitter * expected_max(gpus),
        "network": exposed_s(all_reduce_s(gpus, num_bytes, a), num_buckets(num_bytes, a), backward_s, a),
    }
    nodes = -(-gpus // per_node)
    times = {
        "work": sum(parts.values()),
        "reading": total * a.image_kb * 1e3 / (min(nodes * a.node_read_gb_s, a.storage_gb_s) * 1e9),
        "decoding": share / (a.cores_per_gpu * a.decode_per_core + a.decode_per_gpu),
    }
    slowest = max(times, key=lambda name: times[name])
    step_s = times[slowest]
    alone = 1.0 if gpus == 1 else predict(scenario, 1).images_per_s
    speed = total / step_s
    work_s = num_steps(scenario, gpus) * step_s + num_evaluations(scenario, gpus) * a.val_images / (3 * speed)
    goodput = model_failures(scenario, gpus).goodput(interval_s(scenario, gpus, step_s, cfg.checkpoint.every))
    hours = (a.start_s + work_s / goodput) / 3600 if goodput else math.inf
    return Row(
        gpus=gpus,
        global_batch=total,
        step_s=step_s,
        work_s=times["work"],
        read_s=times["reading"],
        decode_s=times["decoding"],
        parts=parts,
        images_per_s=speed,
        efficiency=1.0 if gpus == 1 else speed / (gpus * alone),
        goodput=goodput,
        hours=hours,
        cost=hours * gpus * a.price_per_gpu_hour,
        bound=max(parts, key=lambda name: parts[name]) if slowest == "work" else slowest,
    )


def compare_transports(scenario: Scenario, row: Row) -> dict[str, dict[str, float]] | None:
    """The row's step by RDMA and over TCP, and what of it waits for the network; None on one node, which needs none."""
    a = scenario.assumed
    if row.gpus <= a.gpus_per_node:
        return None
    rows = {
        name: predict(replace(scenario, assumed=replace(a, rdma=rdma)), row.gpus)
        for name, rdma in (("rdma", 1), ("tcp", 0))
    }
    return {name: {"network_s": r.parts["network"], "step_s": r.step_s} for name, r in rows.items()}


def num_steps(scenario: Scenario, gpus: int) -> int:
    (total, _), images, train = split_batch(scenario, gpus), scenario.images, scenario.cfg.train
    if images < total:
        fix = "--batch-per-gpu" if scenario.batch_per_gpu else "train.global_batch"
        raise UserError(f"--gpus {gpus}: a global batch of {total} is more than the {images} images; lower {fix}")
    return train.steps or train.epochs * (images // total)


def num_evaluations(scenario: Scenario, gpus: int) -> int:
    total, _ = split_batch(scenario, gpus)
    return math.ceil(num_steps(scenario, gpus) / (scenario.images // total) / scenario.cfg.train.eval_every)


def model_failures(scenario: Scenario, gpus: int) -> FailureModel:
    """The state is weights, the optimizer's copies, and averages, 4 bytes each."""
    optim = scenario.cfg.optim
    moments = 2 if optim.name in ("adamw", "lamb") else int(optim.momentum > 0)
    copies = 1 + moments + int(scenario.cfg.train.ema_decay is not None)
    state_gb = scenario.model.parameters * 4 * copies / 1e9
    a = scenario.assumed
    return FailureModel(a.gpu_mtbf_h * 3600 / gpus, a.restart_s, state_gb / a.hold_gb_s, state_gb / a.write_gb_s)


def interval_s(scenario: Scenario, gpus: int, step_s: float, every: int) -> float:
    """Between two checkpoints: one that is due while another is being written is postponed."""
    return max(min(every, num_steps(scenario, gpus)) * step_s, model_failures(scenario, gpus).write)


def best_every(scenario: Scenario, row: Row) -> int:
    """The checkpoint.every that loses least, to two digits, since the optimum is flat."""
    steps = model_failures(scenario, row.gpus).best_interval() / row.step_s
    rounded = float(f"{max(1.0, steps):.2g}")
    return min(math.ceil(rounded), num_steps(scenario, row.gpus))


def compare_intervals(scenario: Scenario, row: Row) -> dict[str, Any]:
    """The configured checkpoint.every beside the best, by the closed form and by simulation."""
    failures = model_failures(scenario, row.gpus)
    work_s = num_steps(scenario, row.gpus) * row.step_s

    def judge(every: int) -> dict[str, Any]:
        interval = interval_s(scenario, row.gpus, row.step_s, every)
        runs = failures.simulate(work_s, interval)
        goodput = {"goodput": failures.goodput(interval), "simulated": None if runs is None else _spread(runs)}
        return {"every": every, "interval_s": interval, **goodput}

    return {
        **asdict(failures),
        "young_s": failures.young(),
        "daly_s": failures.daly(),
        "failures": row.hours * 3600 / failures.mtbf if row.goodput else None,
        "configured": judge(scenario.cfg.checkpoint.every),
        "best": judge(best_every(scenario, row)),
    }


def _spread(values: FloatArray) -> dict[str, float]:
    low, high = np.percentile(values, [5, 95]).tolist()
    error = float(values.std() / math.sqrt(len(values)))
    return {"mean": float(values.mean()), "error": error, "low": low, "high": high}
