"""Which kernels torch takes, in how many bits: as configured, and by shape alone where figures are to be the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import FAST, context
from torch import nn

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.events import Event
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training.backends import kernels_by_shape, set_backends
from pipeline.training.loop import fit
from pipeline.training.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_settings_become_torchs(monkeypatch: pytest.MonkeyPatch, tf32: bool, deterministic: bool) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settings = [f"train.tf32={tf32}", f"train.deterministic={deterministic}"]
    set_backends(load(None, ["data.train=x", "data.val=x", *settings]).train, CPU)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark == (not deterministic)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32


def test_an_evaluation_takes_kernels_by_shape_and_a_training_by_speed(
    digits_index: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an evaluation's last bits would depend on what was quickest when cuDNN tried it."""
    cudnn, index = torch.backends.cudnn, str(digits_index("few"))
    seen = set[tuple[bool, bool, bool]]()

    def watch(module: nn.Module, _: Any) -> None:
        seen.add((module.training, cudnn.benchmark, cudnn.deterministic))

    create = TrainState.create

    def watched(*args: Any) -> Any:
        state = create(*args)
        state.model.register_forward_pre_hook(watch)
        return state

    monkeypatch.setattr(TrainState, "create", watched)
    few = ["train.steps=2", "train.ema_decay=null", "train.precision=fp32"]
    cfg = load(None, [*FAST, *few, f"data.train={index}", f"data.val={index}", f"run.storage={tmp_path}"])
    (tmp_path / "run").mkdir()
    events = list[Event]()
    fit(RunSpec(cfg, Storage(tmp_path / "run"), index, index), context(events=events))
    assert seen == {(True, True, False), (False, False, True)}


@pytest.mark.parametrize("words", [["evaluate"], ["predict", "{digits}/few"]])
def test_commands_compute_as_the_training_did(
    digits_index: Callable[[str], Path], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """torch's default is TF32 in convolutions alone."""
    index = str(digits_index("few"))
    few = ["train.steps=2", "train.ema_decay=null", "train.precision=fp32", "train.tf32=false"]
    cfg = load(None, [*FAST, *few, f"data.train={index}", f"data.val={index}", f"run.storage={tmp_path}"])
    (tmp_path / "run").mkdir()
    fit(RunSpec(cfg, Storage(tmp_path / "run"), index, index), context(events=[]))
    torch.backends.cudnn.allow_tf32 = True
    command, *rest = [word.format(digits=digits) for word in words]
    assert app.main([command, str(tmp_path / "run"), *rest, "--json"]) == 0
    assert not torch.backends.cudnn.allow_tf32


def test_what_was_set_before_is_set_again() -> None:
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    with kernels_by_shape():
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
