"""The solar cells as a data set: scripts/make_elpv.py on the real package."""

from collections import Counter
from pathlib import Path

import make_elpv
import pytest
from elpv_dataset.utils import load_dataset
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.thorough]  # decoding and writing all 2,624 takes most of a minute


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "elpv"
    assert make_elpv.write(folder) == {"train": 1970, "val": 654}
    return folder


def places(cells: Path, split: str) -> dict[int, str]:
    """Number of a cell -> its class's folder."""
    return {int(path.stem): path.parent.name for path in (cells / split).glob("*/*.png")}


def test_each_cell_is_in_one_part_with_its_own_label(cells: Path) -> None:
    """A cell in both parts would make the accuracy too good."""
    _, likelihoods, _ = load_dataset()
    train, val = places(cells, "train"), places(cells, "val")
    assert train.keys().isdisjoint(val)
    assert sorted([*train, *val]) == list(range(2624))
    labels = train | val
    assert all((labels[i] == "defective") == (likelihood > 0.5) for i, likelihood in enumerate(likelihoods))


def test_a_quarter_of_each_kind_and_certainty_is_for_validation(cells: Path) -> None:
    _, likelihoods, kinds = load_dataset()
    strata = list(zip(likelihoods.tolist(), kinds.tolist(), strict=True))
    inside = Counter(strata[i] for i in places(cells, "val"))
    assert len(inside) == 8
    assert all(abs(inside[stratum] - count / 4) <= 0.5 for stratum, count in Counter(strata).items())


def test_the_photographs_are_written_as_they_are(cells: Path) -> None:
    photographs, _, _ = load_dataset()
    for path in sorted(cells.glob("*/*/*.png"))[::500]:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (300, 300))
            assert (photographs[int(path.stem)] == image).all()
