"""Whether a GPU that waits for kernels is told from one that computes. Run with: pytest -m gpu"""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT

from pipeline.bench import train
from pipeline.bench.verdict import MOST, HostLead, Measured, train_verdict
from pipeline.config.loading import load
from pipeline.data.loading.loader import Batch, LoaderContext
from pipeline.training.state import TrainState
from pipeline.training.step import train_step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("batch", "size", "bound"), [(2, 32, "host"), (256, 224, "compute")])
def test_a_late_host_is_told_from_a_busy_gpu(batch: int, size: int, bound: str) -> None:
    """ResNet-50 has some 160 layers: to launch them takes longer than to compute them for two tiny images."""
    settings = ["model.depth=50", f"train.global_batch={batch}", f"data.image_size={size}", "train.precision=bf16"]
    cfg, context = load(None, ["data.train=x", "data.val=x", *settings]), LoaderContext.here()
    state = TrainState.create(cfg, 10, context.device)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=context.device)
    images = images.contiguous(memory_format=torch.channels_last)
    one = Batch(images, torch.randint(0, 10, (batch,), device=context.device), np.arange(batch))
    lead = HostLead(context.device)
    for _ in range(2):  # the first round warms up
        torch.cuda.synchronize()
        lead.start()
        for done in range(10):
            train_step(state, state.model, one, cfg.train, lr=0.01, world_size=1)
            lead.step(done)
        late = lead.late_share()
    measured = Measured(1.0, 0.0, 0.0, host_late_share=late, memory_share=0.5, is_split=False)
    assert train_verdict(measured, cfg, context).bound == bound, late


def test_bench_train_finds_the_host_late_with_tiny_batches(digits: Path) -> None:
    """And counts each round once, although a GPU's last two logs come together."""
    settings = [f"data.train={digits}/train", f"data.val={digits}/val", "cluster.workers=1", "train.global_batch=8"]
    cfg = load(ROOT / "configs/digits.yaml", [*settings, "model.depth=50", "train.precision=bf16"])
    result = train.bench_train(cfg, LoaderContext.here(), 3, 10, lambda done, total, text: None)
    assert len(result["rows"][train.PIPELINE]["per_round"]) == 3
    assert max(result["rows"][train.PIPELINE]["per_round"]) < 2 * max(result["rows"][train.CEILING]["per_round"])
    assert result["host_late_share"] > MOST
    assert result["bound"] in ("host", "data"), "DALI has a fixed cost for each batch, too"
    assert 0 < result["memory_share"] < 0.5
