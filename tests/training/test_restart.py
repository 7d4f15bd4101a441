"""A run that goes on at step k is as fast at its first step as one at step 0: nothing is replayed."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ranks import no_bad_image

from pipeline.config.data import DataConfig
from pipeline.data.index import Index, load_index
from pipeline.data.loading.loader import LoaderContext, TrainLoader

NUM_ROWS = 10_000_000
BATCH = 64


@pytest.fixture
def ten_million(digits_index: Callable[[str], Path], tmp_path: Path) -> Path:
    """The digits' index over and over."""
    table = pa.ipc.open_file(pa.memory_map(str(digits_index("train")))).read_all()
    repeated = pa.concat_tables([table] * (NUM_ROWS // len(table) + 1)).slice(0, NUM_ROWS)
    Index(repeated).save(tmp_path / "index.arrow")
    return tmp_path / "index.arrow"


def seconds_to_first_batch(path: Path, step: int) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    index = load_index(path)
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32)
    place = LoaderContext(rank=0, world_size=1, device=torch.device("cpu"), num_threads=1)
    loader = TrainLoader(index, cfg, place, no_bad_image, global_batch=BATCH, seed=0)
    batch = next(loader.from_step(step, step + 1))
    return time.perf_counter() - began, batch.rows


def test_the_first_step_comes_as_fast_in_the_middle_of_ten_million_rows(ten_million: Path) -> None:
    middle = 7 * (NUM_ROWS // BATCH) + 100_000  # in the eighth epoch
    seconds_to_first_batch(ten_million, 0)  # warms up
    times: dict[int, list[float]] = {0: [], middle: []}
    for _ in range(5):
        for step, measured in times.items():
            taken, rows = seconds_to_first_batch(ten_million, step)
            measured.append(taken)
            assert len(set(rows.tolist())) == BATCH
    first, resumed = (statistics.median(measured) for measured in times.values())
    print(f"first batch after {1000 * first:.0f} ms at step 0, {1000 * resumed:.0f} ms at step {middle}")
    assert resumed < 1.5 * first + 0.05
