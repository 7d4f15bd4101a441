"""What a plan assumes: cards, links, storage, failures, prices; each number with its unit and where it comes from.

One table, so that every number can be shown beside a prediction and be replaced by a measured one.
"""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from pipeline.errors import UserError

Origin = Literal["measured", "published", "assumed", "counted", "given"]
TINY, HUGE = 1e-6, 1e9  # beyond these nothing in the table is real
NVIDIA = "NVIDIA DeepLearningExamples, ResNet-50 v1.5 PyTorch, 21.03"


@dataclass(frozen=True)
class Card:
    """Data sheets: peak (dense bf16, or fp16 where there is no bf16), memory, NVLink or PCIe; the rest as clouds
    commonly rent them, and prices are rough guesses of on-demand ones, which differ threefold between sellers.
    Each is what `Assumptions` assume by the same name.
    """

    peak_tflops: float
    memory_gb_s: float
    gpus_per_node: int
    link_gb_s: float  # one direction, of one card to the others of its node
    network_gb_s: float  # of one node
    cores_per_gpu: float  # CPU cores
    price_per_gpu_hour: float  # $


CARDS = {
    "B200": Card(2250, 8000, 8, 900, 400, 28, 6.0),
    "H200": Card(989, 4800, 8, 450, 400, 24, 4.0),
    "H100": Card(989, 3350, 8, 450, 400, 24, 3.0),
    "A100": Card(312, 2039, 8, 300, 100, 12, 1.8),  # 80 GB, SXM: the one that the published figures are of
    "L40S": Card(362, 864, 8, 32, 50, 16, 1.2),
    "A10": Card(125, 600, 4, 32, 12.5, 12, 0.8),
    "L4": Card(121, 300, 8, 32, 12.5, 12, 0.7),
    "V100": Card(125, 900, 8, 150, 12.5, 10, 1.5),
    "T4": Card(65, 320, 4, 16, 6.25, 12, 0.4),
}


def _num(default: float, origin: Origin, unit: str, text: str, *, low: float = TINY, high: float = HUGE) -> Any:
    metadata = {"origin": origin, "unit": unit, "text": text, "low": low, "high": high}
    return field(default=default, metadata=metadata)


def _card(attribute: str, unit: str, text: str, origin: Origin = "published") -> Any:
    return _num(getattr(CARDS["A100"], attribute), origin, unit, text)


@dataclass(frozen=True)
class Assumptions:
    """Every number that a prediction rests on beside the configuration. Names and units are those of --assume."""

    peak_tflops: float = _card("peak_tflops", "TFLOP/s", "of a card, dense bf16 or fp16; the data sheet's")
    memory_gb_s: float = _card("memory_gb_s", "GB/s", "of a card's memory; the data sheet's")
    gpus_per_node: float = _card("gpus_per_node", "", "as clouds rent them", "assumed")
    link_gb_s: float = _card("link_gb_s", "GB/s", "a card to the others of its node, one way; the data sheet's")
    network_gb_s: float = _card("network_gb_s", "GB/s", "of a node to the others", "assumed")
    cores_per_gpu: float = _card("cores_per_gpu", "", "CPU cores, as clouds rent them", "assumed")
    price_per_gpu_hour: float = _card("price_per_gpu_hour", "$", "a rough guess: ask your seller", "assumed")
    resnet50_images_s: float = _num(2470, "published", "/s", f"one A100, AMP, batch 256 ({NVIDIA})")
    resnet50_memory_gb_s: float = _num(2039, "published", "GB/s", "of that card")
    fp32_speed: float = _num(0.38, "published", "", "of fp32 to AMP: TF32 938 / 2,470 there", high=1)
    peak_share: float = _num(0.5, "assumed", "", "of the peak, that convolutions reach at most", high=1)
    launch_us: float = _num(120, "assumed", "us", "to launch a layer, all passes; forward alone took 117 there", low=0)
    full_node: float = _num(0.865, "published", "", "kept in a full node; fitted to 16,621 on 8 A100s there", high=1)
    grad_bytes: float = _num(4, "counted", "B", "of a gradient on the wire, as cluster.gradients has it")
    bucket_mb: float = _num(25, "counted", "MB", "of gradients in a bucket: cluster.bucket_mb")
    link_share: float = _num(0.7, "assumed", "", "of a link's data sheet that an all-reduce attains", high=1)
    rdma: float = _num(1, "assumed", "", "1: RDMA between nodes; 0: TCP, which NCCL takes without it", low=0, high=1)
    tcp_gb_s: float = _num(
        4, "published", "GB/s", "of a node, at most, over TCP: 4 to 6 of 100 Gbit/s (NVIDIA/nccl, issue 450)"
    )
    latency_us: float = _num(10, "assumed", "us", "of one hop of an all-reduce", low=0)
    overlap: float = _num(
        1, "assumed", "", "of the backward pass, that an all-reduce can hide behind; 0: none", low=0, high=1
    )
    jitter: float = _num(0.02, "assumed", "", "a rank's step time: standard deviation / mean", low=0)
    image_kb: float = _num(110, "published", "kB", "of a JPEG; ImageNet-1k: 138 GB / 1.28 million")
    node_read_gb_s: float = _num(2, "assumed", "GB/s", "that a node reads at")
    storage_gb_s: float = _num(40, "assumed", "GB/s", "of the storage to all nodes together")
    decode_per_core: float = _num(1004, "measured", "/s", "images, 500x375 to 224; docs/performance.md")
    decode_per_gpu: float = _num(0, "assumed", "/s", "images, by the card's decoder: not measured, so left out", low=0)
    gpu_mtbf_h: float = _num(50_000, "published", "h", "of a card and its share of the rest: Llama 3, 419 in 54 d")
    restart_s: float = _num(120, "assumed", "s", "from a failure to training; 33 measured here, on 2 CPU cores", low=0)
    hold_gb_s: float = _num(7, "measured", "GB/s", "copy of the state, which steps wait for; docs/reliability.md")
    write_gb_s: float = _num(0.45, "measured", "GB/s", "writing it beside training; docs/reliability.md")
    start_s: float = _num(60, "assumed", "s", "until the first step; 21 measured here, on 2 CPU cores", low=0)
    val_images: float = _num(50_000, "published", "", "ImageNet-1k's, in each evaluation", low=0)


NAMES = {f.name: f.metadata for f in fields(Assumptions)}


def assume(gpu: str, words: Sequence[str]) -> tuple[Assumptions, dict[str, Origin]]:
    """The assumptions of a card with `name=value` words on top, and each one's origin.

    Raises:
        UserError: an unknown card or name, or a value that cannot be.
    """
    if gpu.upper() not in CARDS:
        raise UserError(f"--gpu {gpu}: not in the table; use one of {', '.join(CARDS)}{_hint(gpu.upper(), CARDS)}")
    assumptions = Assumptions(**asdict(CARDS[gpu.upper()]))
    origins: dict[str, Origin] = {name: meta["origin"] for name, meta in NAMES.items()}
    for word in words:
        name, _, text = word.partition("=")
        if name not in NAMES:
            raise UserError(f"--assume {word}: no assumption {name!r}{_hint(name, NAMES)}; `pipeline plan` lists all")
        assumptions, origins[name] = replace(assumptions, **{name: _parse(word, name, text)}), "given"
    return assumptions, origins


def _parse(word: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--assume {word}: must be a number, such as {name}={getattr(Assumptions, name):g}") from None
    low, high = NAMES[name]["low"], NAMES[name]["high"]
    if not (low <= value <= high):
        raise UserError(f"--assume {word}: must be a number, at least {low:g} and at most {high:g}")
    if name in ("gpus_per_node", "rdma") and value != int(value):
        raise UserError(f"--assume {word}: must be a whole number")
    return value


def _hint(name: str, known: Any) -> str:
    names = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {names[0]}?" if names else ""
