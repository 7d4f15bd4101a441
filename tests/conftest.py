"""Shared by the tests: small data sets of real pixels, and running `fit` without Ray."""

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The tests of one machine are no census of a product's users.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A training that a test leaves open would measure the machine for ever, and tell of its deleted store in another test.
os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "100000")
# Tests run side by side: threads that spin while they wait would take the cores from each other, and what is trained
# would tell of neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import make_digits
import pytest
import torch
from commands import ROOT, Run, Start, trainings
from ranks import context
from stores import copy_instead_of_migrating

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.data.indexing.build import build_index
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training.loop import fit

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each
    torch.set_num_threads(1)
copy_instead_of_migrating()


BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--within", type=float, metavar="SECONDS", help="begin no test later; each commit begins elsewhere"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --within, so that none of the tests is left out by each commit."""
    if config.getoption("--within") is not None and items:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        first = items[int(commit, 16) % len(items)].path  # whole files: tests of one share what they have set up
        start = next(i for i, item in enumerate(items) if item.path == first)
        items[:] = items[start:] + items[:start]


def pytest_runtest_setup(item: pytest.Item) -> None:
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() > BEGAN + within:
        pytest.skip(f"begins later than --within={within:g} s")


@pytest.fixture(autouse=True)
def no_tracking_uri() -> Iterator[None]:
    """MLflow sets this variable where a program sets the URI, and so one test would reach the next.

    After a test, too: fixtures of the next module come before its first test. Not by monkeypatch, which would bring
    back what a test has deleted with it.
    """
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images: a folder with train/ and val/."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_digits.write(folder)
    return folder


@pytest.fixture(scope="session")
def digits_index(digits: Path) -> Callable[[str], Path]:
    """The index file of the demo's "train" or "val" images, or of "few" of the latter: 13 of each digit."""

    def path(split: str) -> Path:
        file = digits / f"{split}.arrow"
        if split == "few" and not file.exists():
            for label in (digits / "val").iterdir():
                (digits / split / label.name).mkdir(parents=True)
                for image in sorted(label.iterdir())[:13]:
                    shutil.copy(image, digits / split / label.name)
        if not file.exists():
            build_index(digits / split)[0].save(file)
        return file

    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts whole trainings as a user does; what still runs of them at the test's end is killed."""
    with trainings(tmp_path) as start_one:
        yield start_one


@pytest.fixture(scope="session")
def trained(
    digits: Path, digits_index: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The summary of a short training of ResNet-18, whose run is called "small", and its registered model "digits"."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    run_dir.mkdir()
    settings = [
        "model.depth=18",
        "train.steps=66",
        "train.global_batch=16",
        "optim.warmup_epochs=0.1",
        "checkpoint.every=40",
    ]
    cfg = load(ROOT / "configs/digits.yaml", [*settings, "mlflow.register=digits"])
    data = dataclasses.replace(cfg.data, train=str(digits / "train"), val=str(digits / "val"))
    indexes = str(digits_index("train")), str(digits_index("val"))
    return fit(RunSpec(dataclasses.replace(cfg, data=data), Storage(run_dir), *indexes), context())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command: (exit code, stdout, stderr)."""

    def run_cli(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = app.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run_cli
