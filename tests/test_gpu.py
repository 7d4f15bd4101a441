"""What only a GPU can show. Run with: pytest -m gpu"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import no_bad_image

from pipeline.config import DataConfig
from pipeline.data import Place, TrainLoader
from pipeline.data.index import load_index

pytestmark = pytest.mark.gpu


def test_gpu_batches_are_the_cpus_to_within_decoding(digits_index: Callable[[str], Path]) -> None:
    """Same samples, crops and flips; nvJPEG's inverse DCT and chroma differ from libjpeg-turbo's by little."""
    index = load_index(digits_index("train"))
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, crop_scale=(0.3, 1.0))
    cpu, gpu = (
        TrainLoader(index, cfg, Place(0, 1, torch.device(d), 2), no_bad_image, global_batch=50, seed=3).from_step(0, 10)
        for d in ("cpu", "cuda")
    )
    for one, other in zip(cpu, gpu, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert other.images.is_cuda
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.labels, other.labels.cpu())
        assert (one.images.int() - other.images.cpu().int()).abs().float().mean() < 2
