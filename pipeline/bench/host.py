"""`pipeline bench loader --host`: what feeding batches takes from the process that trains.

No GPU is needed: batches are read and handed to DALI as they are for a GPU, and DALI only pretends to decode them. All
Python that runs here takes the interpreter lock from the thread that launches kernels. A thread of small Python work
stands in for that one: how much of its speed does it keep beside the loader?
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from pipeline.bench.common import batch_per_worker, describe_machine, spread
from pipeline.config.schema import Config
from pipeline.data.batch_spec import TrainSpecs, draw_names, make_sampler
from pipeline.data.index import Index
from pipeline.data.indexing.build import Progress, open_index
from pipeline.data.loading.bad_images import BadImages
from pipeline.data.loading.dali import DaliPipeline, gpu_inputs
from pipeline.data.loading.fetch import EncodedBatch
from pipeline.data.loading.graph import Graph, Source
from pipeline.data.loading.readers import Readers, for_ever
from pipeline.data.loading.to_device import to_device
from pipeline.failures import READ_SOURCE_S
from pipeline.text import between, columns, figure

CPU = torch.device("cpu")
PRETENDED_PER_S = 5000.0  # images
TURN_S = 4.0  # of the small work, alone and beside the loader
WARM_UP = 8  # batches
AIMS = {"process_ms": 5.0, "thread_ms": 2.0}  # of CPU, for a batch of 256
AIM_KEPT = 0.97
MAX_BAD = 1.0


def bench_host(cfg: Config, num_rounds: int, num_images: int, progress: Progress) -> dict[str, Any]:
    """Measure by turns the small work alone, the same beside the loader, and the loader at its own speed.

    Args:
        num_images: of a round at its own speed, rounded up to whole batches.

    Raises:
        UserError: no such data, or not one whole batch.
    """
    index, _ = open_index(cfg.data.train, progress=progress)
    batch = min(batch_per_worker(cfg), len(index))
    num_batches = -(-num_images // batch)
    figures: dict[str, list[float]] = {"process_ms": [], "thread_ms": [], "images_per_s": [], "kept": []}
    with _batches(index, cfg, batch) as batches:
        for _ in range(WARM_UP):
            next(batches)
        for i in range(num_rounds):
            alone = _small_work(TURN_S)
            beside = _small_work(TURN_S, partial(_load, batches, batch / PRETENDED_PER_S))
            cost = _cost(batches, num_batches)
            figures["kept"].append(beside / alone)
            figures["process_ms"].append(cost[0] * 1e3)
            figures["thread_ms"].append(cost[1] * 1e3)
            figures["images_per_s"].append(batch / cost[2])
            progress(i + 1, num_rounds, f"of its speed the small work keeps {figures['kept'][-1]:.3f}")
    return {
        "train": cfg.data.train,
        "batch": batch,
        "rounds": num_rounds,
        "images_per_round": batch * num_batches,
        "pretended_images_per_s": PRETENDED_PER_S,
        **{key: value for name, values in figures.items() for key, value in spread(name, np.array(values)).items()},
        "machine": describe_machine(),
    }


def format_result(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    scale = 256 / result["batch"]
    words = {"process_ms": "CPU of the training process, ms a batch", "thread_ms": "of it on the launching thread"}
    rows = [("", "median", "quartiles", "for 256 images", "aim")]
    for name, text in words.items():
        of_256 = figure(result[name] * scale, ".2f")
        rows.append(
            (text, figure(result[name], ".2f"), between(result[f"{name}_quartiles"], ".2f"), of_256, f"{AIMS[name]:g}")
        )
    return [
        f"batches of {result['batch']} of {result['train']}, {result['rounds']} rounds",
        *columns(rows, "<>>>>"),
        f"images/s at its own speed, decoding pretended: {result['images_per_s']:.0f} "
        f"({between(result['images_per_s_quartiles'], '.0f')})",
        f"beside the loader at {result['pretended_images_per_s']:.0f} images/s, a thread of small Python work keeps "
        f"{result['kept']:.3f} of its speed ({between(result['kept_quartiles'], '.3f')}); the aim is {AIM_KEPT}",
    ]


@pipeline_def  # type: ignore[untyped-decorator]
def _pretended_graph(source: Source, num_inputs: int) -> Any:
    encoded, *values = fn.external_source(source=source, num_outputs=num_inputs, batch=True, no_copy=True)
    return fn.slice(encoded, 0, 1, axes=[0]), *values


@contextmanager
def _batches(index: Index, cfg: Config, batch: int) -> Iterator[Iterator[Any]]:
    """Batches without end as a GPU's training gets them, but for their pixels."""
    draws = draw_names(cfg.data)
    sampler = make_sampler(cfg.data, len(index), batch, cfg.run.seed)
    bad_images = BadImages(index, MAX_BAD, lambda *_: None)
    num_held = DaliPipeline.num_held(cfg.data, torch.device("cuda"))
    options = {"num_threads": 1, "device_id": None, "prefetch_queue_depth": cfg.data.prefetch}
    graph = Graph[EncodedBatch](
        partial(_pretended_graph, num_inputs=5 + len(draws), batch_size=batch, **options),
        partial(gpu_inputs, draws=draws),
    )
    specs = TrainSpecs(cfg.data, sampler, 0, 1)
    readers = Readers(index, cfg.data, specs, num_held, bad_images, lambda _: None, READ_SOURCE_S, for_ever)

    def load() -> Iterator[Any]:
        graph.begin(readers.read(range(2**40)))
        previous: EncodedBatch | None = None
        while True:
            encoded, _ = graph.run()
            if previous is not None:
                previous.release()
            previous = encoded
            spec = encoded.spec
            arrays = [spec.labels, *(spec.mixture or ())]
            yield [to_device(array, CPU) for array in arrays]

    with closing(readers):
        yield load()
        graph.close()


def _cost(batches: Iterator[Any], number: int) -> tuple[float, float, float]:
    """Of a batch: seconds of CPU of this process, of this thread, and seconds."""
    clocks = (time.process_time, time.thread_time, time.perf_counter)
    began = [clock() for clock in clocks]
    for _ in range(number):
        next(batches)
    process, thread, wall = ((clock() - start) / number for clock, start in zip(clocks, began, strict=True))
    return process, thread, wall


def _load(batches: Iterator[Any], period_s: float, stop: threading.Event) -> None:
    """A batch every `period_s` seconds, until told to stop."""
    due = time.perf_counter()
    while not stop.is_set():
        next(batches)
        due = max(due + period_s, time.perf_counter() - period_s)
        time.sleep(max(0.0, due - time.perf_counter()))


def _small_work(seconds: float, beside: Callable[[threading.Event], None] | None = None) -> float:
    """How often a second a thread does some small work, `beside` something that this one does."""
    stop, done = threading.Event(), list[float]()

    def work() -> None:
        began, count, items = time.perf_counter(), 0, dict.fromkeys(range(16), 0)
        while not stop.is_set():
            for i in items:
                items[i] += 1
            count += 1
        done.append(count / (time.perf_counter() - began))

    thread = threading.Thread(target=work)
    timer = threading.Timer(seconds, stop.set)
    thread.start()
    timer.start()
    if beside is not None:
        beside(stop)
    thread.join()
    return done[0]
