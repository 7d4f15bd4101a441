"""Settings that are for speed alone: they train the same, and say so where they cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import context, run_ranks
from test_train import FAST

from pipeline.config import ConfigError
from pipeline.job import Event, Job
from pipeline.settings import load
from pipeline.storage import Storage
from pipeline.train import fit

STEPS = 6


@pytest.fixture
def job(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., Job]:
    """Makes a job of a few logged steps, by run name and overrides."""

    def make(name: str, *overrides: str) -> Job:
        train, val = digits_index("train"), digits_index("val")
        few = [f"train.steps={STEPS}", "train.log_every=1", "train.ema_decay=null", f"run.storage={tmp_path}"]
        cfg = load(None, [f"data.train={train}", f"data.val={val}", *FAST, *few, *overrides])
        (tmp_path / name).mkdir(exist_ok=True)
        return Job(cfg, Storage(tmp_path / name), str(train), str(val))

    return make


def train(rank: int, world_size: int, *jobs: Job) -> list[tuple[list[float], dict[str, Any]]]:
    """The losses and the summary of each."""
    found = []
    for one in jobs:
        events: list[Event] = []
        summary = fit(one, context(rank, world_size, events))
        found.append(([e["train/loss"] for e in events if e["kind"] == "step"], summary))
    return found


def test_gradients_in_bf16_train_alike(job: Callable[..., Job]) -> None:
    """To the accuracy of bf16, about three digits; that the losses differ at all shows that they were used."""
    calm = "train.precision=fp32", "optim.lr=0.002"  # else the differences grow with each step
    whole, half = run_ranks(train, 2, job("fp32", *calm), job("bf16", *calm, "cluster.gradients=bf16"))[0]
    assert len(half[0]) == STEPS
    assert half[0] == pytest.approx(whole[0], rel=0.02)
    assert half[0][1:] != whole[0][1:]


def test_buckets_of_another_size_train_the_same(job: Callable[..., Job]) -> None:
    """Between two ranks a sum has one order, whatever is sent together."""
    small, large = run_ranks(train, 2, job("small", "cluster.bucket_mb=1"), job("large", "cluster.bucket_mb=100"))[0]
    assert small[0] == large[0]


@pytest.mark.e2e
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_a_compiled_network_trains_alike(job: Callable[..., Job], world_size: int) -> None:
    """Its fused operations round otherwise. The first step, in which it is compiled, is told apart."""
    settings = "train.precision=fp32", "optim.lr=0.002"
    jobs = job("eager", *settings), job("compiled", *settings, "model.compile=default")
    eager, compiled = run_ranks(train, world_size, *jobs)[0]
    assert compiled[0] == pytest.approx(eager[0], rel=0.01)
    assert compiled[1]["top1"] == pytest.approx(eager[1]["top1"], abs=0.05)
    assert "compile" not in eager[1]["seconds"]
    assert compiled[1]["seconds"]["compile"] > 2
    assert compiled[1]["seconds"]["forward"] < 10 * eager[1]["seconds"]["forward"]


def test_compiling_without_a_compiler_is_refused(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    one = job("run", "model.compile=default")
    wanted = (
        r"model.compile=default: needs a C\+\+ compiler on every node, and no-such-compiler is not here; install it"
    )
    with pytest.raises(ConfigError, match=wanted):
        fit(one, context())
