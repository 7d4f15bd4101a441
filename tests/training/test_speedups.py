"""Settings that are for speed alone: they train the same, and say so where they cannot."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from ranks import FAST, context, run_ranks

from pipeline.config.loading import load
from pipeline.errors import UserError
from pipeline.events import Event, StepLogged
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training.loop import fit

STEPS = 5


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """Makes a job of a few logged steps, by run name and overrides."""
    return partial(make_job, digits_index, tmp_path)


def make_job(digits_index: Callable[[str], Path], folder: Path, name: str, *overrides: str) -> RunSpec:
    train, val = digits_index("train"), digits_index("few")
    few = [f"train.steps={STEPS}", "train.log_every=1", "train.ema_decay=null", f"run.storage={folder}"]
    cfg = load(None, [f"data.train={train}", f"data.val={val}", *FAST, *few, *overrides])
    (folder / name).mkdir(exist_ok=True)
    return RunSpec(cfg, Storage(folder / name), str(train), str(val))


def train(rank: int, world_size: int, *specs: RunSpec) -> list[tuple[list[float], dict[str, Any]]]:
    """The losses and the summary of each."""
    found = []
    for one in specs:
        events: list[Event] = []
        summary = fit(one, context(rank, world_size, events))
        found.append(([e.metrics["train/loss"] for e in events if isinstance(e, StepLogged)], summary))
    return found


@pytest.fixture(scope="module")
def losses(digits_index: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Of two workers, by what is sent how between them: trained in turn by the same processes, which start once."""
    spec = partial(make_job, digits_index, tmp_path_factory.mktemp("speedups"))
    calm = "train.precision=fp32", "optim.lr=0.002"  # else the differences grow with each step
    specs = {
        "plain": spec("plain", *calm, "cluster.bucket_mb=100"),
        "bf16": spec("bf16", *calm, "cluster.bucket_mb=100", "cluster.gradients=bf16"),
        "fp16": spec("fp16", *calm, "cluster.bucket_mb=100", "cluster.gradients=fp16"),
        "small": spec("small", *calm, "cluster.bucket_mb=1"),
    }
    found = run_ranks(train, 2, *specs.values())[0]
    return {name: curve for name, (curve, _) in zip(specs, found, strict=True)}


@pytest.mark.parametrize(("kind", "accuracy"), [("bf16", 0.02), ("fp16", 0.0025)])
def test_gradients_of_fewer_bits_train_alike(losses: dict[str, list[float]], kind: str, accuracy: float) -> None:
    """To the accuracy of 8 bits and of 11; that the losses differ at all shows that they were used."""
    assert len(losses[kind]) == STEPS
    assert losses[kind] == pytest.approx(losses["plain"], rel=accuracy)
    assert losses[kind][1:] != losses["plain"][1:]


def test_buckets_of_another_size_train_the_same(losses: dict[str, list[float]]) -> None:
    """Between two ranks a sum has one order, whatever is sent together."""
    assert losses["small"] == losses["plain"]


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_compiled_network_trains_alike(spec: Callable[..., RunSpec], world_size: int) -> None:
    """Its fused operations round otherwise. The first step, in which it is compiled, is told apart."""
    settings = "train.precision=fp32", "optim.lr=0.002"
    specs = spec("eager", *settings), spec("compiled", *settings, "model.compile=default")
    eager, compiled = run_ranks(train, world_size, *specs)[0]
    assert compiled[0] == pytest.approx(eager[0], rel=0.01)
    assert compiled[1]["top1"] == pytest.approx(eager[1]["top1"], abs=0.05)
    assert "compile" not in eager[1]["seconds"]
    assert compiled[1]["seconds"]["compile"] > 0
    assert compiled[1]["seconds"]["forward"] < 10 * eager[1]["seconds"]["forward"]


COMPILED_STEP = """
import torch
from pipeline.training.compilation import compiled
net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), torch.nn.BatchNorm2d(12), torch.nn.ReLU())
compiled(net, "default")(torch.randn(2, 3, 8, 8)).sum().backward()
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.e2e
@pytest.mark.long
def test_kernels_that_another_kind_of_cpu_compiled_are_not_taken(tmp_path: Path) -> None:
    """A home folder that unlike nodes share, a machine that moved: what is cached there has vectors of other sizes."""

    def hits(**env: str) -> int:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **env}
        return int(subprocess.run([sys.executable, "-c", COMPILED_STEP], env=env, check=True, stdout=PIPE).stdout)

    assert hits(ATEN_CPU_CAPABILITY="default") == 0
    assert hits() == 0
    assert hits() > 0


def test_compiling_without_a_compiler_is_refused(spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    one = spec("run", "model.compile=default")
    wanted = r"model\.compile=default: needs a C\+\+ compiler \(no-such-compiler\) on .*; install it there"
    with pytest.raises(UserError, match=wanted):
        fit(one, context())
