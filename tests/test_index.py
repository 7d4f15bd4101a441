"""The index: what it takes, what it refuses and why, and that it is the same every time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_images import write_odd_folder
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.index import Refused, build_index, load_index, read_header


def test_rows_are_sorted_and_hold_what_the_files_hold(digits: Path) -> None:
    index, refused = build_index(digits / "train")
    assert refused == []
    assert len(index) == 1437
    assert index.classes == tuple("0123456789")
    paths = [index.path(row) for row in range(len(index))]
    assert paths == sorted(paths)
    for row in (0, 700, 1436):
        assert index.read(row) == (digits / "train" / paths[row]).read_bytes()
        assert index.classes[index.labels[row]] == paths[row].split("/")[0]
    assert set(index.heights) == set(index.widths) == {32}


def test_the_saved_index_is_the_same_and_mapped(digits: Path, tmp_path: Path) -> None:
    index, _ = build_index(digits / "val")
    index.save(tmp_path / "val.arrow")
    loaded = load_index(tmp_path / "val.arrow")
    assert loaded.fingerprint == index.fingerprint
    assert np.array_equal(loaded.labels, index.labels)
    assert not loaded.labels.flags.owndata  # a view of the mapped file


def test_the_fingerprint_tells_data_apart_but_not_places(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(digits / "val")
    original = build_index(digits / "val")[0].fingerprint
    assert build_index(tmp_path / "moved")[0].fingerprint == original
    changed = tmp_path / "changed"
    for file in sorted((digits / "val").glob("*/*.jpg"))[:20]:
        (changed / file.parent.name).mkdir(parents=True, exist_ok=True)
        (changed / file.parent.name / file.name).write_bytes(file.read_bytes())
    before = build_index(changed)[0].fingerprint
    renamed = next(changed.glob("*/*.jpg"))
    renamed.rename(renamed.with_name("other.jpg"))
    assert len({original, before, build_index(changed)[0].fingerprint}) == 3


def test_odd_images_are_indexed_or_refused_by_name(tmp_path: Path) -> None:
    usable, unusable = write_odd_folder(tmp_path)
    index, refused = build_index(tmp_path)
    assert {index.path(row) for row in range(len(index))} == usable
    reasons = {Path(one.path).relative_to(tmp_path).as_posix(): one.reason for one in refused}
    assert set(reasons) == set(unusable)
    for path, expected in unusable.items():
        assert expected in reasons[path], path
    assert "void" not in index.classes


def test_exif_rotation_swaps_height_and_width(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(tmp_path / "turned.jpg", exif=exif)
    header = read_header(tmp_path / "turned.jpg")
    assert not isinstance(header, Refused)
    assert header[1:] == (80, 60)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"no folder .*/data; expected .*/data/CLASS/image\.jpg"),
        (lambda p: p.mkdir(), "has no class folders"),
        (lambda p: (p / "a").mkdir(parents=True), "has no usable image"),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        build_index(tmp_path / "data")


def test_files_that_are_no_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_text("not arrow")
    with pytest.raises(ConfigError, match=r"x\.arrow is not an index file"):
        load_index(tmp_path / "x.arrow")
    with pytest.raises(ConfigError, match=r"no folder or index file .*none\.arrow"):
        load_index(tmp_path / "none.arrow")


def test_validation_classes_take_the_training_numbers(digits: Path, tmp_path: Path) -> None:
    index, _ = build_index(digits / "val")
    classes = ("a", *reversed(index.classes))
    relabelled = index.with_classes(classes)
    assert [classes[k] for k in relabelled.labels] == [index.classes[k] for k in index.labels]
    with pytest.raises(ConfigError, match="has class '9', which the training images do not have"):
        index.with_classes(tuple("012345678"))


def test_a_file_that_shrank_is_an_error_not_a_short_read(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x.jpg"
    file.write_bytes(next((digits / "val").glob("*/*.jpg")).read_bytes())
    index, _ = build_index(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"x\.jpg: \d+ bytes where the index has"):
        index.read(0)
