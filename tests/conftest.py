"""Shared by the tests: small data sets of real pixels, and running `fit` without Ray."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# The tests of one machine are no census of a product's users.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
from commands import Start, trainings

from pipeline.data.build import build_index

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import make_digits


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow sets this variable where a program sets the URI, and so one test would reach the next."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images: a folder with train/ and val/."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_digits.write(folder)
    return folder


@pytest.fixture(scope="session")
def digits_index(digits: Path) -> Callable[[str], Path]:
    """The index file of the demo's "train" or "val" images."""

    def path(split: str) -> Path:
        file = digits / f"{split}.arrow"
        if not file.exists():
            build_index(digits / split)[0].save(file)
        return file

    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts whole trainings as a user does; what still runs of them at the test's end is killed."""
    with trainings(tmp_path) as start_one:
        yield start_one
