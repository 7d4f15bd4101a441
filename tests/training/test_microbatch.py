"""A GPU whose memory is short: smaller parts, the same step and figures. The shortage is pretended, not its error."""

import json
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import context, no_bad_image, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.config.training import CompileMode, ModelConfig
from pipeline.data.index import load_index
from pipeline.data.loading.loader import Batch, EvalLoader, LoaderContext
from pipeline.errors import UserError
from pipeline.events import Event, Warned
from pipeline.models.resnet import ResNet
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking.metrics import Predictions
from pipeline.training.evaluation import evaluate
from pipeline.training.loop import fit
from pipeline.training.microbatch import AutoMicrobatch, OomSplitter, may_try_out
from pipeline.training.state import TrainState
from pipeline.training.step import train_step


class Short(nn.Module):
    """A network for which there is memory for `room` images only; it breaks when part of the work is done."""

    def __init__(self, model: nn.Module, room: int):
        super().__init__()
        self.model, self.room, self.sizes = model, room, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        out: Tensor = self.model(images)  # which moves the BatchNorms' statistics
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return out


def config(*overrides: str) -> Config:
    data = ["data.train=x", "data.val=x", "data.image_size=32", "data.val_resize=32"]
    return load(None, [*data, "model.depth=18", "train.precision=fp32", "train.global_batch=12", *overrides])


def batch(seed: int, size: int, side: int = 32) -> Batch:
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    return Batch(images, torch.randint(0, 10, (size,)), torch.arange(size).numpy())


def stepped(cfg: Config, room: int | None, said: list[str]) -> tuple[dict[str, Tensor], list[int]]:
    """The weights after three steps."""
    state = TrainState.create(cfg, 10, torch.device("cpu"))
    net = Short(state.model, 99 if room is None else room)
    micro_batches = AutoMicrobatch(cfg.train, room is not None, said.append)
    for seed in range(3):
        size = micro_batches.size(state, net, batch(seed, 12))
        train_step(state, net, batch(seed, 12), cfg.train, lr=0.05, world_size=1, micro_batch=size)
    return state.model.state_dict(), net.sizes


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_micro_batch_is_halved_until_it_fits_and_the_step_is_the_same(optimizer: str) -> None:
    said: list[str] = []
    short, sizes = stepped(config(f"optim.name={optimizer}"), 4, said)
    assert sizes == [12, 6, 3, 3, *[3] * 4 * 3]  # tried out once, two of those that fit, then three steps
    assert ["6 instead of 12" in said[0], "3 instead of 6" in said[1], len(said)] == [True, True, 2]
    assert "the global batch stays" in said[0]
    asked, _ = stepped(config(f"optim.name={optimizer}", "train.micro_batch=3"), None, said)
    for name, value in asked.items():
        assert torch.equal(short[name], value), name


def test_where_memory_suffices_nothing_is_said_or_changed() -> None:
    said: list[str] = []
    roomy, _ = stepped(config(), 12, said)
    plain, _ = stepped(config(), None, said)
    assert not said
    assert all(torch.equal(roomy[name], value) for name, value in plain.items())


def test_a_single_image_that_does_not_fit_gets_one_line() -> None:
    state = TrainState.create(config(), 10, torch.device("cpu"))
    micro_batches = AutoMicrobatch(config().train, True, lambda text: None)
    with pytest.raises(
        UserError, match=r"data.image_size=64: a single image does not fit .* model.activation_checkpointing=true"
    ):
        micro_batches.size(state, Short(state.model, 0), batch(0, 2, 64))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs_are_not_split(mode: CompileMode) -> None:
    """A graph's next run writes over the gradients that the first one left. Without graphs all parts are tried out."""
    state, cfg = TrainState.create(config(), 10, torch.device("cpu")), config().train
    net, said = Short(state.model, 4), list[str]()
    micro_batches = AutoMicrobatch(cfg, True, said.append, mode)
    if mode == "default":
        assert micro_batches.size(state, net, batch(0, 12)) == 3
        assert net.sizes == [12, 6, 3, 3, 3, 3]
    else:
        with pytest.raises(
            UserError, match=r"model\.compile=reduce-overhead: a worker's 12 images do not fit .*=default"
        ):
            micro_batches.size(state, net, batch(0, 12))


def rank_step(rank: int, world_size: int, room: int) -> Any:
    """One step of two ranks, of which the second one's memory is short."""
    cfg = config()
    state = TrainState.create(cfg, 10, torch.device("cpu"))
    inner = Short(state.model, room if rank == 1 else 99)
    net = DistributedDataParallel(inner, forward_sync_buffers=False)  # which would be one more exchange a forward
    said: list[str] = []
    micro_batches = AutoMicrobatch(cfg.train, True, said.append)
    before = deepcopy(dict(state.model.named_buffers()))
    share = batch(rank, 6)
    size = micro_batches.size(state, net, share)
    untouched = all(torch.equal(before[name], buffer) for name, buffer in state.model.named_buffers())
    train_step(state, net, share, cfg.train, lr=0.05, world_size=world_size, micro_batch=size)
    return size, len(said), untouched, state.model.fc.weight.detach().clone()


def test_a_rank_that_is_short_of_memory_does_not_hold_up_the_others() -> None:
    first, second = run_ranks(rank_step, 2, 3)
    assert first[:3] == (6, 0, True)
    assert second[:3] == (3, 1, True)
    assert torch.equal(first[3], second[3])


def evaluated(cfg: Config, index: Path, room: int, in_parts: OomSplitter) -> tuple[Predictions, list[int]]:
    """What a network says for which there is memory for `room` images, and the sizes it was given."""
    torch.manual_seed(0)
    net = Short(ResNet(ModelConfig(depth=18, zero_init_residual=False), 10), room)
    here = LoaderContext(0, 1, torch.device("cpu"), 1)
    with closing(EvalLoader(load_index(index), cfg.data, here, no_bad_image, batch=128, views="flip")) as loader:
        said = evaluate(net, loader, precision="fp32", device=here.device, in_parts=in_parts)
    return said, net.sizes


def test_an_evaluation_goes_on_in_parts_and_each_image_has_its_own_row(digits_index: Callable[[str], Path]) -> None:
    said: list[str] = []
    in_parts = OomSplitter(said.append)
    index = digits_index("val")
    whole, _ = evaluated(config(), index, 128, OomSplitter(pytest.fail))
    parts, sizes = evaluated(config(), index, 40, in_parts)
    chunk, rest = [32] * 4, [32, 32, 32, 8]  # 360 images are 128, 128 and 104
    assert sizes == [128, 64, *chunk, *chunk, *chunk, *chunk, *rest, *rest]  # each chunk and its mirror image
    assert ["64 instead of 128" in said[0], "32 instead of 64" in said[1], len(said)] == [True, True, 2]
    assert "the figures stay" in said[0]
    assert parts.best.tolist() == whole.best.tolist()
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    again, sizes = evaluated(config(), index, 40, in_parts)  # the next one of the attempt
    assert (len(said), max(sizes)) == (2, 32)
    assert again.losses.tolist() == parts.losses.tolist()


def test_a_single_image_that_cannot_be_evaluated_gets_one_line(digits_index: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"data.val_size=32: a single image does not fit into the GPU's memory; low"):
        evaluated(config(), digits_index("val"), 0, OomSplitter(lambda text: None))


def test_trainings_and_commands_evaluate_in_parts(
    digits_index: Callable[[str], Path],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward = ResNet.forward

    def short(model: ResNet, x: Tensor, keep: Tensor | None = None) -> Tensor:
        if not model.training and len(x) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return forward(model, x, keep)

    monkeypatch.setattr(ResNet, "forward", short)
    train = val = digits_index("few")  # 128 and 2 images
    quiet = ["mlflow.log_model=false", "mlflow.report=false", "mlflow.checkpoints=none"]
    cfg = config(f"data.train={train}", f"data.val={val}", "train.steps=1", f"run.storage={tmp_path}", *quiet)
    (tmp_path / "run").mkdir()
    events: list[Event] = []
    trained = fit(RunSpec(cfg, Storage(tmp_path / "run"), str(train), str(val)), context(events=events))
    line = "the GPU's memory is short: 64 instead of 128 images at a time; the figures stay, to within rounding"
    assert [event.text.startswith(line) for event in events if isinstance(event, Warned)] == [True]
    capsys.readouterr()
    for words in (["evaluate"], ["predict", str(digits / "few")], ["report", "--out", str(tmp_path / "report")]):
        assert app.main([words[0], str(tmp_path / "run"), *words[1:], "--json"]) == 0
        told = capsys.readouterr()
        assert told.err.count(line) == 1, told.err
        result = json.loads(told.out)
        assert result.get("top1", trained["top1"]) == trained["top1"]


def test_a_rank_with_synchronised_batch_norm_tries_nothing_out_alone() -> None:
    """It would wait for the others' statistics until cluster.timeout_s."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    alone, together = (config(f"model.sync_bn={word}") for word in ("false", "true"))
    assert may_try_out(alone, gpu, 2)
    assert may_try_out(together, gpu, 1)
    assert not may_try_out(together, gpu, 2)
    assert not may_try_out(alone, cpu, 2)
