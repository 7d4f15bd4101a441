"""Which trainings are compiled, and that each shape of batches is compiled once, for itself."""

import faulthandler
import itertools
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import FAST, context, run_ranks
from torch import nn

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.data.indexing.build import build_index
from pipeline.errors import UserError
from pipeline.events import AttemptStarted, Event, StepLogged, Warned
from pipeline.failures import COMPILE_S, FatalError
from pipeline.models import resnet
from pipeline.runs import checkpoint
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import loop
from pipeline.training.compilation import CompileDecision, decide, missing_tool, num_shapes
from pipeline.training.loop import fit

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(*overrides: str) -> Config:
    return load(None, ["data.train=x", "data.val=x", "train.precision=bf16", "model.compile=auto", *overrides])


EAGER = "eager (model.activation_checkpointing is not compiled)"
LACK = "for half as much speed again, install gcc"


@pytest.mark.parametrize(
    ("device", "overrides", "missing", "num_steps", "kept", "told"),
    [
        (GPU, [], ["", ""], 5000, None, "compiled (a GPU)"),
        (GPU, [], ["", ""], 4999, None, "eager (4999 steps are too few for it to pay)"),
        (CPU, [], ["", ""], 10**6, None, "eager (on a CPU)"),
        (GPU, ["model.sync_bn=true"], [""], 500, None, "eager (model.sync_bn is not compiled)"),
        (GPU, [], ["", "gcc"], 5000, "auto", f"eager ({LACK}; train.precision=fp16 may be quicker)"),
        (GPU, ["train.precision=fp32"], ["gcc"], 5000, None, f"eager ({LACK})"),
        (GPU, [], ["", ""], 9, "default", "compiled (as before)"),
        (GPU, [], ["", ""], 500, "none", "eager (as before)"),
        (GPU, [], ["", "gcc"], 9, "default", "eager (no gcc)"),
        (CPU, [], ["", ""], 9, "default", "eager (on a CPU)"),
        (GPU, ["model.activation_checkpointing=true"], [""], 9, "default", EAGER),
        (GPU, ["model.compile=none"], ["x"], 500, "default", ""),
        (GPU, ["train.deterministic=true"], [""], 5000, None, "eager (train.deterministic is not compiled)"),
        (CPU, ["model.compile=reduce-overhead"], [""], 9, None, "compiled (as configured)"),
    ],
)
def test_what_auto_becomes(
    device: torch.device, overrides: list[str], missing: list[str], num_steps: int, kept: Any, told: str
) -> None:
    decision = decide(config(*overrides), device, missing=missing, num_steps=num_steps, kept=kept)
    assert str(decision) == told
    assert decision.applied_to(config(*overrides)).model.compile == decision.mode != "auto"
    lacks = kept == "default" and told in ("eager (no gcc)", "eager (on a CPU)")
    assert decision.kept == (kept if lacks else decision.mode), "by later attempts"


def test_a_machine_that_cannot_compile_what_is_to_be_is_refused() -> None:
    cfg = config("model.compile=max-autotune")
    with pytest.raises(UserError, match=r"model\.compile=max-autotune: needs gcc; install it there"):
        decide(cfg, GPU, missing=["", "gcc"], num_steps=9)


def test_what_was_never_tried_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.activation_checkpointing=true: cannot be combined with model\.compile"
    ):
        config("model.activation_checkpointing=true", "model.compile=default")
    with pytest.raises(UserError, match=r"train\.deterministic=true: cannot be combined with model\.compile=default"):
        config("train.deterministic=true", "model.compile=default")
    cfg = config("model.sync_bn=true", "model.compile=default")  # a checkpoint of an earlier version may have that
    with pytest.raises(UserError, match=r"model\.sync_bn=true: was never tried with model\.compile=default; set"):
        decide(cfg, GPU, missing=[""], num_steps=9)


def test_what_a_machine_lacks_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU's kernels are launched by an extension in C, which needs Python's headers, too."""
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_tool(GPU) == "a C compiler (gcc or clang)"
    assert missing_tool(CPU) == "a C++ compiler (g++)"
    for name in ("clang", "mine"):
        (tmp_path / name).touch(mode=0o755)
    assert missing_tool(GPU) == f"Python's headers ({tmp_path}/Python.h)"
    (tmp_path / "Python.h").touch()
    assert missing_tool(GPU) == ""
    assert missing_tool(CPU) == "a C++ compiler (g++)"
    monkeypatch.setenv("CXX", "mine")
    assert missing_tool(CPU) == ""


@pytest.fixture
def dynamo() -> Iterator[None]:
    """As it was before and after."""
    config = torch._dynamo.config
    before = config.recompile_limit, config.fail_on_recompile_limit_hit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.recompile_limit, config.fail_on_recompile_limit_hit = before


@pytest.mark.usefixtures("dynamo")
def test_each_shape_is_compiled_once_and_for_itself(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five sizes of images, and parts of 3 and 2 of the share of 5: more than torch compiles by itself."""
    shapes, fed = list[tuple[int, ...]](), list[float]()

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        (images,) = {tuple(t.shape) for t in inputs if t.dtype == torch.uint8}
        shapes.append(images)
        return graph.forward

    class Tiny(resnet.ResNet):
        def __init__(self, cfg: Any, num_classes: int):
            super().__init__(cfg, num_classes)
            self.conv1, self.bn1 = resnet.Conv2d(3, 4, 7, stride=4, bias=False), nn.BatchNorm2d(4)
            self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential() for _ in range(4))
            self.fc = nn.Linear(4, num_classes)

    real, dump_later = torch.compile, faulthandler.dump_traceback_later

    def compile_by_it(net: Any, *, mode: str, dynamic: bool) -> Any:
        return real(net, backend=counting, dynamic=dynamic)

    def dumped_later(timeout: float, **kwargs: Any) -> None:
        fed.append(timeout)
        dump_later(timeout, **kwargs)

    monkeypatch.setattr(resnet, "ResNet", Tiny)
    monkeypatch.setattr(torch, "compile", compile_by_it)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", dumped_later)
    for label, number in (("0", 3), ("1", 2)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for image in sorted((digits / "val" / label).iterdir())[:number]:
            shutil.copy(image, tmp_path / "images" / label)
    build_index(tmp_path / "images")[0].save(index := tmp_path / "five.arrow")
    settings = [
        *("train.global_batch=5", "train.micro_batch=3", "train.epochs=5", "train.steps=null", "train.eval_every=100"),
        *("data.start_size=32", "data.image_size=96", "data.val_resize=96", "data.grow_epochs=[0,4]"),
        *("checkpoint.every=1000", "train.precision=fp32", "model.compile=default", "train.log_every=1"),
        *("cluster.timeout_s=100", "optim.lr=0.001", "train.ema_decay=null"),
    ]
    cfg = load(None, [*FAST, *settings, f"data.train={index}", f"data.val={index}", f"run.storage={tmp_path}"])
    (tmp_path / "run").mkdir()
    spec = RunSpec(cfg, Storage(tmp_path / "run"), str(index), str(index))
    events = list[Event]()
    fit(spec, context(events=events))
    sizes = range(32, 97, 16)
    assert num_shapes(cfg) >= len(shapes) > 8
    assert shapes == [(n, 3, size, size) for size, n in itertools.product(sizes, (3, 2))]
    assert sum(timeout > COMPILE_S for timeout in fed) == len(sizes), "the watchdog waits longer for each"
    (start,) = [event for event in events if isinstance(event, AttemptStarted)]
    assert start.compilation == "compiled (as configured)"
    speeds = [event.metrics["perf/images_per_s"] for event in events if isinstance(event, StepLogged)]
    assert len(speeds) == len(sizes), "also of steps that do nothing but compile"
    saved = checkpoint.newest_valid(spec.checkpoints, pytest.fail)
    assert saved is not None
    assert saved.cfg.model.compile == "default"


def train_where_one_cannot_compile(rank: int, world_size: int, spec: RunSpec, culprit: int) -> tuple[list[str], int]:
    """What people are told, by rank 0, and how often the network was compiled."""
    num_compiled, real = 0, torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal num_compiled
        num_compiled += 1
        if rank == culprit:
            raise RuntimeError("gcc: no space left\nand much more")
        return graph.forward

    def on_a_gpu(*args: Any, **kwargs: Any) -> CompileDecision:
        return CompileDecision("default", "a GPU")

    torch.compile = lambda net, **_: real(net, backend=backend, dynamic=False)  # type: ignore[assignment]
    loop.decide = on_a_gpu  # type: ignore[attr-defined]
    events = list[Event]()
    fit(spec, context(rank, world_size, events))
    starts = [event.compilation for event in events if isinstance(event, AttemptStarted)]
    return [*starts, *(event.text for event in events if isinstance(event, Warned))], num_compiled


@pytest.fixture
def two_steps(digits_index: Callable[[str], Path], tmp_path: Path) -> RunSpec:
    index = str(digits_index("few"))
    settings = ["model.compile=auto", "train.precision=fp32", "train.steps=2", "train.log_every=1"]
    cfg = load(None, [*FAST, *settings, f"data.train={index}", f"data.val={index}", f"run.storage={tmp_path}"])
    (tmp_path / "run").mkdir()
    return RunSpec(cfg, Storage(tmp_path / "run"), index, index)


@pytest.mark.parametrize("culprit", [None, 1])
def test_where_one_rank_cannot_compile_all_do_without(two_steps: RunSpec, culprit: int | None) -> None:
    """A full disk, a compiler that is too old: a training of a week is not to end for it, nor to differ by rank."""
    ranks = run_ranks(train_where_one_cannot_compile, 2, two_steps, culprit)
    failed = f"compiling fails on {socket.gethostname()} (RuntimeError: gcc: no space left): going on uncompiled"
    failed += " until the next start"
    assert ranks[0][0] == ["compiled (a GPU)", *([] if culprit is None else [failed])]
    assert ranks[1][0] == []
    saved = checkpoint.newest_valid(two_steps.checkpoints, pytest.fail)
    assert saved is not None
    assert (saved.cfg.model.compile, saved.meta["compile"]) == ("auto", "default"), "the next attempt tries it again"
    parts = 3  # DDP has the network cut where its buckets end
    assert ranks[0][1] == parts, "once, in the trial: the steps have the same shape"


@pytest.mark.usefixtures("dynamo")
def test_a_mode_that_was_asked_for_is_not_given_up(two_steps: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("gcc: no space left")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **_: real(net, backend=fail, dynamic=False))
    cfg = replace(two_steps.cfg, model=replace(two_steps.cfg.model, compile="default"))
    told = r"model\.compile=default: compiling fails on .*RuntimeError: gcc: no space left.*; fix that, or set model"
    with pytest.raises(FatalError, match=told):
        fit(replace(two_steps, cfg=cfg), context(events=[]))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=told) as raised:  # a full disk, in the midst of a week
        fit(replace(two_steps, cfg=cfg), replace(context(events=[]), restarted=True))
    assert not isinstance(raised.value, FatalError)


@pytest.mark.usefixtures("dynamo")
def test_a_later_size_that_cannot_be_compiled_ends_no_training(
    digits_index: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progressive resizing: the second size comes in the middle of a week."""
    sizes, real = list[int](), torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        sizes.append(next(t.shape[-1] for t in inputs if t.dtype == torch.uint8))
        if sizes[-1] > 32:
            raise RuntimeError("ptxas: out of registers")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda net, **_: real(net, backend=backend, dynamic=False))
    monkeypatch.setattr(loop, "decide", lambda *_, **__: CompileDecision("default", "a GPU"))
    index = str(digits_index("few"))
    settings = ["model.compile=auto", "train.precision=fp32", "train.steps=null", "train.epochs=3", "train.log_every=1"]
    settings += ["data.start_size=32", "data.image_size=64", "data.val_resize=64", "data.grow_epochs=[0,2]"]
    cfg = load(None, [*FAST, *settings, f"data.train={index}", f"data.val={index}", f"run.storage={tmp_path}"])
    (tmp_path / "run").mkdir()
    events = list[Event]()
    summary = fit(RunSpec(cfg, Storage(tmp_path / "run"), index, index), context(events=events))
    assert summary["status"] == "done"
    assert sizes == [32, 48], "after the first failure none is compiled"
    (warning,) = [event.text for event in events if isinstance(event, Warned)]
    assert "ptxas: out of registers" in warning
