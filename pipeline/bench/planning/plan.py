"""`pipeline plan`: what a configuration would do on 8 to 1,024 GPUs, which change would help most, and why.

It exists so that a cluster's size is chosen before it is paid for. The model is in `cost_model` and `failure_model`;
here are the questions put to it, and its check against what `pipeline bench scale` measured.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.bench.planning.assumptions import NAMES, Assumptions, Origin, assume
from pipeline.bench.planning.cost_model import (
    Row,
    Scenario,
    all_reduce_s,
    best_every,
    card_rate,
    compare_intervals,
    compare_transports,
    count_network,
    expected_max,
    exposed_s,
    num_buckets,
    num_steps,
    predict,
    split_batch,
)
from pipeline.config.schema import Config
from pipeline.config.training import GRAPH_MODES
from pipeline.data.index import load_index
from pipeline.data.indexing.find import is_index
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import precision

IMAGENET = 1_281_167
BEFORE_BF16 = {"V100": (7, 0), "T4": (7, 5)}  # the cards before compute capability 8.0, where bf16 begins
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
WARNING = (
    "On paper: nothing here was measured on a GPU. Take images/s and hours as right within a third where arithmetic "
    "bounds them, within a factor of two where launching kernels does, and prices as guesses (docs/performance.md)."
)


def plan(
    cfg: Config,
    gpus: int,
    gpu: str,
    assumed: Sequence[str] = (),
    *,
    batch_per_gpu: int | None = None,
    num_images: int | None = None,
    rate: float | None = None,
    measured: Path | None = None,
) -> dict[str, Any]:
    """All of the answer, as --json gives it.

    Args:
        gpu: a name in the table of cards.
        assumed: `name=value` words, which win over the table.
        batch_per_gpu: weak scaling; None keeps train.global_batch.
        num_images: of the training data; None: the index's, else ImageNet-1k's.
        rate: images/s of one GPU alone, measured; None for the model's.
        measured: the JSON of `pipeline bench scale`, to be predicted.

    Raises:
        UserError: anything in these that cannot be.
    """
    a, origins = assume(gpu, assumed)
    card = precision.gpu(BEFORE_BF16.get(gpu.upper(), (8, 0)))
    cfg = precision.with_precision(cfg, precision.decide(cfg.train.precision, [card]).precision)
    model = count_network(cfg.model, cfg.data.image_size)
    index = _index_here(cfg.data.train)
    known = {"bucket_mb": float(cfg.cluster.bucket_mb)}
    if cfg.cluster.gradients != "fp32":
        known["grad_bytes"] = 2
    if index is not None:
        known["image_kb"] = float(index.sizes.mean()) / 1e3
    counted = {name: value for name, value in known.items() if origins[name] != "given"}
    a, origins = replace(a, **counted), origins | dict.fromkeys(counted, "counted")
    if origins["launch_us"] != "given" and cfg.model.compile in GRAPH_MODES:
        a = replace(a, launch_us=a.launch_us / 5)
    images = num_images or (len(index) if index is not None else IMAGENET)
    scenario = Scenario(cfg, a, model, images, batch_per_gpu, rate)
    row = predict(scenario, gpus)
    sizes = [n for n in sorted({*SIZES, gpus}) if n == gpus or _fits(scenario, n)]
    conditions = {
        WARNING: True,
        f"data.train={cfg.data.train} is no index here: ImageNet-1k's {IMAGENET:,} images are assumed.": (
            num_images is None and index is None
        ),
        f"A {gpu.upper()} has no fast bf16: train.precision=fp16 is assumed.": (
            cfg.train.precision == "bf16" and gpu.upper() in BEFORE_BF16
        ),
        "The global batch grows with the GPUs: optim.lr must follow it, and above 8,192 images accuracy is at risk "
        "(Goyal et al. 2017).": batch_per_gpu is not None,
        f"data.start_size is left out: all epochs count as {cfg.data.image_size} pixels.": (
            cfg.data.start_size is not None and cfg.data.start_size < cfg.data.image_size
        ),
        f"On {gpus} GPUs failures come faster than the run gets on: it would not end.": math.isinf(row.hours),
    }
    return {
        "gpu": gpu.upper(),
        "gpus": gpus,
        "scaling": "weak" if batch_per_gpu else "strong",
        "network": asdict(model) | {"depth": cfg.model.depth, "image_size": cfg.data.image_size},
        "precision": cfg.train.precision,
        "epochs": cfg.train.epochs if cfg.train.steps is None else None,
        "steps": cfg.train.steps,
        "images": images,
        "images_per_s_per_gpu": {
            "value": rate or card_rate(model, cfg.train.precision, a),
            "origin": "given" if rate else "modelled",
        },
        "rows": [_to_json(row if n == gpus else predict(scenario, n)) for n in sizes],
        "between_nodes": compare_transports(scenario, row),
        "changes": try_changes(scenario, row),
        "checkpoints": compare_intervals(scenario, row),
        "measured": check_efficiency(_read(measured), a, origins) if measured else None,
        "assumptions": {
            name: {"value": value, "unit": NAMES[name]["unit"], "origin": origins[name], "what": NAMES[name]["text"]}
            for name, value in asdict(a).items()
        },
        "notes": [note for note, holds in conditions.items() if holds],
    }


def _index_here(source: str) -> Any:
    """The index, where there is one on this machine: planning needs no data."""
    file = Storage(source).local
    return load_index(file) if is_index(source) and file and file.is_file() else None


def _fits(scenario: Scenario, gpus: int) -> bool:
    try:
        num_steps(scenario, gpus)
    except UserError:
        return False
    return True


def _to_json(row: Row) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {name: None if value == math.inf else value for name, value in asdict(row).items()}


def try_changes(scenario: Scenario, row: Row) -> list[dict[str, Any]]:
    """What one change each would make of the hours, the most helpful first."""
    a, cfg = scenario.assumed, scenario.cfg
    best = best_every(scenario, row)
    assumptions: dict[str, dict[str, float]] = {
        "model.compile=reduce-overhead, which is CUDA graphs (launch_us a fifth)": {"launch_us": a.launch_us / 5},
        "cluster.gradients=bf16 (grad_bytes=2)": {"grad_bytes": min(2, a.grad_bytes)},
        "twice the network of a node (network_gb_s)": {"network_gb_s": 2 * a.network_gb_s},
        "twice the reading (node_read_gb_s, storage_gb_s)": {
            "node_read_gb_s": 2 * a.node_read_gb_s,
            "storage_gb_s": 2 * a.storage_gb_s,
        },
        "decoding on the GPU, or twice the cores (cores_per_gpu)": {"cores_per_gpu": 2 * a.cores_per_gpu},
        "half the jitter between ranks (jitter)": {"jitter": a.jitter / 2},
        "restarts in half the time (restart_s)": {"restart_s": a.restart_s / 2},
    }
    if not a.rdma:
        assumptions["RDMA between nodes (rdma=1), as k8s/overlays/rdma has it"] = {"rdma": 1}
    tried = {text: replace(scenario, assumed=replace(a, **values)) for text, values in assumptions.items()}
    checkpoint = replace(cfg.checkpoint, every=best)
    tried[f"checkpoint.every={best}"] = replace(scenario, cfg=replace(cfg, checkpoint=checkpoint))
    larger = "four times the images on each GPU (another recipe: optim.lr, warm-up)"
    if scenario.batch_per_gpu:
        tried[larger] = replace(scenario, batch_per_gpu=4 * scenario.batch_per_gpu)
    else:
        tried[larger] = replace(scenario, cfg=replace(cfg, train=replace(cfg.train, global_batch=4 * row.global_batch)))
    changes = []
    for text, other in tried.items():
        total, _ = split_batch(other, row.gpus)
        hours = predict(other, row.gpus).hours if total <= scenario.images else math.inf
        if math.isfinite(row.hours) and math.isfinite(hours):
            changes.append({"change": text, "hours": hours, "saves": 1 - hours / row.hours})
    return sorted(changes, key=lambda change: -float(change["saves"]))


def predicted_efficiency(compute_s: float, parameters: int, workers: int, a: Assumptions) -> float:
    """Scaling efficiency of workers that each compute `compute_s` a step when alone.

    `a.network_gb_s` is each worker's share of what joins them, as it is attained by whatever carries it.
    """
    flat = replace(a, gpus_per_node=1, link_share=1, rdma=1)
    num_bytes = parameters * a.grad_bytes
    wait_s = exposed_s(all_reduce_s(workers, num_bytes, flat), num_buckets(num_bytes, a), compute_s * 2 / 3, a)
    return compute_s / (compute_s * (1 + a.jitter * expected_max(workers)) + wait_s)


def check_efficiency(scale: dict[str, Any], a: Assumptions, origins: dict[str, Origin]) -> dict[str, Any]:
    """Predicted beside measured efficiency, from one worker's figures, the link and the jitter alone.

    Workers that share memory or cores compute more slowly together, which the model does not know: compute_ratio tells.

    Args:
        scale: what `pipeline bench scale` measured.
    """
    try:
        one = scale["workers"]["1"]
        alone, parameters = float(one["images_per_s"]), int(scale["parameters"])
        compute_s = float(one.get("compute_s_per_step") or scale["global_batch_per_worker"] / alone)
        several = {int(n): row for n, row in scale["workers"].items() if int(n) > 1}
        speeds = {n: float(row["images_per_s"]) for n, row in several.items()}
        computed = {n: float(row["compute_s_per_step"]) for n, row in several.items() if "compute_s_per_step" in row}
        if "allreduce_gb_s" in scale and origins["network_gb_s"] != "given":
            a = replace(a, network_gb_s=float(scale["allreduce_gb_s"]))
        elif origins["network_gb_s"] != "given":
            raise UserError("--measured: the file has no allreduce_gb_s; give --assume network_gb_s=GB/s of the link")
        if "images_per_s_quartiles" in one and origins["jitter"] != "given":
            low, high = one["images_per_s_quartiles"]
            a = replace(a, jitter=(high - low) / 1.349 / alone)  # of a normal law
        if min(alone, compute_s, parameters, a.network_gb_s, *speeds.values()) <= 0 or a.jitter < 0:
            raise ValueError("figures must be above 0")
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError("--measured: not what `pipeline bench scale --json` writes; give its file") from e
    return {
        "network_gb_s": a.network_gb_s,
        "jitter": a.jitter,
        "overlap": a.overlap,
        "workers": {
            n: {
                "predicted": predicted_efficiency(compute_s, parameters, n, a),
                "measured": speed / (n * alone),
                "compute_ratio": computed[n] / compute_s if n in computed else None,
            }
            for n, speed in sorted(speeds.items())
        },
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"--measured {path}: cannot be read ({e}); give the JSON of `pipeline bench scale`") from None
    return content if isinstance(content, dict) else {}
