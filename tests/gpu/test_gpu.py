"""What only a GPU can show. Run with: pytest -m gpu"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_images import damaged_jpeg, encode, picture
from ranks import context, final_state, no_bad_image, run_ranks
from torch import Tensor

from pipeline.cluster.affinity import near
from pipeline.config.data import DataConfig
from pipeline.config.loading import load
from pipeline.config.training import ModelConfig
from pipeline.data.index import load_index
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.loader import Batch, LoaderContext, TrainLoader
from pipeline.models.resnet import ResNet, drop_rates
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking.ledger import TimeLedger
from pipeline.training.compilation import compiled
from pipeline.training.ddp import wrap_model
from pipeline.training.evaluation import log_probabilities
from pipeline.training.loop import fit
from pipeline.training.losses import LossReader
from pipeline.training.microbatch import AutoMicrobatch, OomSplitter
from pipeline.training.state import TrainState
from pipeline.training.step import train_step

pytestmark = pytest.mark.gpu


@pytest.fixture
def full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, in which torch computes fp32's convolutions, has 10 bits: too few to compare two ways of computing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


PLAIN = DataConfig(train="-", val="-", image_size=32, val_resize=32, crop_scale=(0.3, 1.0))
# Without operations that turn a small difference into a large one, as posterize and equalize do.
AUGMENTED = dataclasses.replace(
    PLAIN, jitter=(0.2, 0.2, 0.2, 0.0), erase=0.5, mixup=0.2, cutmix=1.0, start_size=24, grow_epochs=(0, 1)
)


ON_CPU = dataclasses.replace(PLAIN, decode_on_gpu=False)


@pytest.mark.parametrize("cfg", [PLAIN, AUGMENTED, ON_CPU], ids=["plain", "augmented", "decoded on the CPU"])
def test_gpu_batches_are_the_cpus_to_within_decoding(digits_index: Callable[[str], Path], cfg: DataConfig) -> None:
    """Same samples, crops and flips; nvJPEG's inverse DCT and chroma differ from libjpeg-turbo's by little."""
    index = load_index(digits_index("train"))
    cpu, gpu = (
        TrainLoader(
            index, cfg, LoaderContext(0, 1, torch.device(d), 2), no_bad_image, global_batch=50, seed=3
        ).from_step(0, 10)
        for d in ("cpu", "cuda")
    )
    for one, other in zip(cpu, gpu, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert other.images.is_cuda
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.labels, other.labels.cpu())
        assert (one.images.int() - other.images.cpu().int()).abs().float().mean() < 2


@pytest.mark.parametrize("policy", ["trivial", "rand", "auto"])
def test_automatic_augmentations_run_on_a_gpu(digits_index: Callable[[str], Path], policy: str) -> None:
    cfg = dataclasses.replace(PLAIN, auto_augment=policy)  # type: ignore[arg-type]
    index, place = load_index(digits_index("train")), LoaderContext(0, 1, torch.device("cuda:0"), 2)
    one, again = (
        [
            batch.images.clone()
            for batch in TrainLoader(index, cfg, place, no_bad_image, global_batch=50, seed=3).from_step(0, 5)
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_broken_images_are_replaced_on_a_gpu(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i:02d}.jpg").write_bytes(damaged_jpeg() if i == 7 else encode(picture(seed=i), "JPEG"))
    cfg, named = dataclasses.replace(PLAIN, max_bad_fraction=0.1), list[str]()
    loader = TrainLoader(
        build_index(tmp_path)[0],
        cfg,
        LoaderContext(0, 1, torch.device("cuda:0"), 2),
        lambda place, _: named.append(place),
        global_batch=10,
        seed=0,
    )
    assert [len(batch.images) for batch in loader.from_step(0, 6)] == [10] * 6
    assert [Path(place).stem for place in named] == ["07"]


def test_the_ledger_follows_the_stream() -> None:
    """Work that is queued counts as computing, also while the host waits for something else; the sum is wall time."""
    device = torch.device("cuda:0")
    a = torch.randn(8192, 8192, device=device)
    (a @ a)[0, 0].item()
    began = time.perf_counter()
    ledger = TimeLedger("start-up", device)

    def batches() -> Iterator[int]:
        for i in range(20):
            time.sleep(0.002)  # hidden behind what is queued
            yield i

    for _ in ledger.steps(batches()):
        for _ in range(10):
            a @ a
    seconds = ledger.seconds()
    wall = time.perf_counter() - began
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.02)
    assert seconds["data wait"] < 0.02 * seconds["forward"]


@pytest.mark.usefixtures("full_fp32")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_is_the_same_step(mode: str) -> None:
    """With CUDA graphs, too, over several steps."""
    states = list[TrainState]()
    for compile_mode in ("none", mode):
        cfg = load(
            None, ["data.train=x", "data.val=x", "model.depth=18", "train.global_batch=32", "train.precision=fp32"]
        )
        state = TrainState.create(cfg, 10, torch.device("cuda:0"))
        net = state.model if compile_mode == "none" else compiled(state.model, compile_mode)
        torch.manual_seed(1)
        for _ in range(5):
            images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8, device="cuda")
            batch = Batch(images, torch.randint(0, 10, (32,), device="cuda"), np.arange(32))
            train_step(state, net, batch, cfg.train, lr=0.01, world_size=1)
        states.append(state)
    for one, other in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_a_gpus_worker_is_pinned_next_to_it() -> None:
    cores = near(torch.cuda.get_device_properties(0))
    assert not cores or cores <= set(range(os.cpu_count() or 1))


def test_micro_batches_are_halved_until_they_fit() -> None:
    """With 3 GiB for a share of 128 images that takes more."""
    settings = ["model.depth=50", "train.global_batch=128", "train.precision=bf16"]
    cfg = load(None, ["data.train=x", "data.val=x", *settings])
    state, said = TrainState.create(cfg, 10, torch.device("cuda:0")), list[str]()
    images = torch.randint(0, 256, (128, 3, 224, 224), dtype=torch.uint8, device="cuda")
    batch = Batch(images, torch.randint(0, 10, (128,), device="cuda"), np.arange(128))
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        size = AutoMicrobatch(cfg.train, True, said.append).size(state, state.model, batch)
        train_step(state, state.model, batch, cfg.train, lr=0.01, world_size=1, micro_batch=size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= size < 128
    assert f"{size} instead of {2 * size} images at a time" in said[-1]
    assert state.step == 1


def _synchronized_step(rank: int, world_size: int, batch: tuple[Tensor, Tensor], sync_bn: bool) -> dict[str, Tensor]:
    """The weights after one step on a rank's share of the batch. All ranks share the one GPU, so gloo has to do."""
    device = torch.device("cuda:0")
    torch.backends.cudnn.allow_tf32 = False  # see full_fp32; this process ends here
    settings = ["data.image_size=32", "model.depth=18", "train.global_batch=32", "train.precision=fp32"]
    settings += [f"model.sync_bn={str(sync_bn).lower()}"]
    cfg = load(None, ["data.train=x", "data.val=x", *settings])
    state = TrainState.create(cfg, 10, device)
    net = wrap_model(state.model, cfg, world_size, device, TimeLedger("start-up", device))
    images, labels = (tensor.chunk(world_size)[rank].to(device) for tensor in batch)
    share = Batch(images.contiguous(memory_format=torch.channels_last), labels, np.arange(len(labels)))
    train_step(state, net, share, cfg.train, lr=0.1, world_size=world_size)
    return {name: value.cpu() for name, value in state.model.state_dict().items()}


def test_two_workers_with_synchronized_batch_norm_step_as_one() -> None:
    torch.manual_seed(5)
    batch = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (32,))
    (whole,) = run_ranks(_synchronized_step, 1, batch, False)
    halves, others = run_ranks(_synchronized_step, 2, batch, True), run_ranks(_synchronized_step, 2, batch, False)
    for name, value in whole.items():
        for half in halves:
            torch.testing.assert_close(half[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert not torch.allclose(others[0]["bn1.running_var"], whole["bn1.running_var"], rtol=1e-3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    digits_index: Callable[[str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    precision: str,
    deterministic: bool,
) -> None:
    """The same images in the same order, and it has learnt; the sums of a GPU's atomic additions may differ, unless
    it is to be deterministic: then all is the same to the last bit.
    """
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    train, val = str(digits_index("train")), str(digits_index("val"))
    common = [
        f"data.train={train}",
        f"data.val={val}",
        "data.image_size=32",
        "data.val_resize=32",
        "data.log_samples=true",
    ]
    common += ["data.crop_scale=[0.7,1.0]", "data.flip=0", "model.depth=18", "optim.lr=0.02", "optim.warmup_epochs=0.5"]
    common += ["train.global_batch=64", "train.epochs=6", "train.log_every=5", f"train.precision={precision}"]
    common += [f"train.deterministic={deterministic}"]
    common += ["mlflow.log_model=false", "mlflow.report=false", "mlflow.checkpoints=none"]

    def trained(name: str, *overrides: str) -> tuple[dict[str, Any], list[list[int]], dict[str, Tensor]]:
        """The summary, the rows of the index by step, and the weights."""
        (tmp_path / name).mkdir(exist_ok=True)
        cfg = load(None, [*common, f"run.storage={tmp_path}", *overrides])
        ctx = dataclasses.replace(context(), device=torch.device("cuda:0"), num_threads=2)
        spec = RunSpec(cfg, Storage(tmp_path / name), train, val)
        summary = fit(spec, ctx)
        lines = (tmp_path / name / "samples" / "rank_0.jsonl").read_text().splitlines()
        return summary, [json.loads(line)["rows"] for line in lines], final_state(spec)["model"]

    whole, order, weights = trained("whole")
    assert trained("parts", "run.stop_at_step=50")[0]["step"] == 50
    parts, order_of_parts, weights_of_parts = trained("parts")
    assert order_of_parts == order
    assert whole["step"] == parts["step"] == 6 * 22
    assert min(whole["top1"], parts["top1"]) > 0.95
    assert parts["loss"] == pytest.approx(whole["loss"], rel=0 if deterministic else 0.1, abs=0)
    if deterministic:
        assert all(torch.equal(weights_of_parts[name], value) for name, value in weights.items())


def test_an_evaluation_is_computed_in_parts_that_fit() -> None:
    """With 2 GiB for 1,024 images that take more: their first layer's output alone is 3 GiB."""
    torch.manual_seed(0)
    model, said = ResNet(ModelConfig(depth=18), 10).cuda().eval(), list[str]()
    brightness = torch.arange(1024, device="cuda").div(4, rounding_mode="floor").to(torch.uint8)
    images = brightness[:, None, None, None].repeat(1, 3, 224, 224)
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with torch.inference_mode():
            parts = log_probabilities(model, [images], "fp32", OomSplitter(said.append))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= len(said) < 10
    assert "512 instead of 1024 images at a time" in said[0]
    with torch.inference_mode():
        whole = log_probabilities(model, [images], "fp32", OomSplitter(pytest.fail))
    assert (whole[0] - whole[-1]).abs().max() > 0.03
    torch.testing.assert_close(parts, whole, rtol=0, atol=0.003)  # TF32, and other kernels for other sizes


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_step_and_its_batch_wait_for_nothing(digits_index: Callable[[str], Path], precision: str) -> None:
    """torch refuses whatever would: mixing, EMA, clipping and the scaler among it."""
    settings = [f"train.precision={precision}", "train.ema_decay=0.9", "train.clip_norm=1", "train.global_batch=64"]
    settings += ["data.mixup=0.2", "data.cutmix=1.0", "model.depth=18", "data.image_size=32", "model.drop_path=0.1"]
    cfg, device = load(None, ["data.train=x", "data.val=x", *settings]), torch.device("cuda:0")
    loader = TrainLoader(
        load_index(digits_index("train")),
        cfg.data,
        LoaderContext(0, 1, device, 2),
        no_bad_image,
        global_batch=64,
        seed=0,
        drop_rates=drop_rates(cfg.model),
    )
    state = TrainState.create(cfg, 10, device)
    losses = LossReader(dataclasses.replace(context(), device=device), TimeLedger("forward", device), late=True)
    with closing(loader):
        for step, batch in enumerate(loader.from_step(0, 6)):
            losses.add(train_step(state, state.model, batch, cfg.train, lr=0.1, world_size=1))
            losses.end_interval(state.step, 0, is_logged=True, now=False)
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")  # first ones may look at what is there
        torch.cuda.set_sync_debug_mode("default")
