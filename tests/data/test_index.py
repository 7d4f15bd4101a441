"""The index: what it takes, what it refuses and why, and that it is the same every time."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_images import damaged_jpeg, encode, picture, write_odd_folder
from PIL import Image
from s3 import s3_storage
from torchvision.datasets import ImageFolder

from pipeline.cli import app
from pipeline.config.data import DataConfig
from pipeline.data.index import Index, load_index
from pipeline.data.indexing import find, rows
from pipeline.data.indexing.build import build_index, drop_rows, fetch_index, index_files, open_index
from pipeline.data.indexing.rows import read_file_header
from pipeline.data.loading.read import Reader
from pipeline.errors import UserError


def read(index: Index, row: int) -> bytes:
    reader = Reader(index, DataConfig())
    try:
        return reader.read(row)
    finally:
        reader.close()


def paths(index: Index) -> list[str]:
    return [index.path(row) for row in range(len(index))]


def test_rows_are_sorted_and_hold_what_the_files_hold(digits: Path) -> None:
    index, report = build_index(digits / "train")
    assert report.refused == []
    assert len(index) == 1437
    assert index.classes == tuple("0123456789")
    names = paths(index)
    assert names == sorted(names)
    for row in (0, 700, 1436):
        assert read(index, row) == (digits / "train" / names[row]).read_bytes()
        assert index.classes[index.labels[row]] == names[row].split("/")[0]
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
    index, report = build_index(tmp_path)
    assert set(paths(index)) == usable
    reasons = {Path(one.path).relative_to(tmp_path).as_posix(): one.reason for one in report.refused}
    assert set(reasons) == set(unusable)
    for path, expected in unusable.items():
        assert expected in reasons[path], path
    assert "void" not in index.classes
    assert [index.path(row) for row in report.cmyk] == ["odd/cmyk.jpg"]


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


def turned_images() -> dict[str, bytes]:
    """60 x 80 pictures that are to be turned by a quarter; and one by XMP alone, which DALI does not read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encode(picture(), "PNG", exif=exif)
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    last = png.index(b"IEND") - 4
    return {
        "late.png": png[:start] + png[end:last] + png[start:end] + png[last:],  # EXIF may come after the pixels
        "turned.jpg": encode(picture(), "JPEG", exif=exif),
        "turned.png": png,
        "turned.tif": encode(picture(), "TIFF", exif=exif),
        "turned.webp": encode(picture(), "WEBP", exif=exif),
        "xmp.jpg": encode(picture(), "JPEG", xmp=XMP.encode()),
    }


def test_exif_orientation_is_applied_as_dali_does(tmp_path: Path) -> None:
    for name, content in turned_images().items():
        (tmp_path / name).write_bytes(content)
        header = read_file_header(tmp_path / name)
        by_xmp = name == "xmp.jpg"
        assert (header.height, header.width, header.exif_rotated) == ((60, 80, False) if by_xmp else (80, 60, True)), (
            name
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"no folder .*/data; expected .*/data/CLASS/image\.jpg"),
        (lambda p: p.mkdir(), "has no class folders"),
        (
            lambda p: p.mkdir() or (p / "1.jpg").touch(),
            r"data has 1 images, but no class folders; put .* such as .*/data/cat/1\.jpg",
        ),
        (
            lambda p: [(p / name).mkdir(parents=True) or (p / name / "x.jpg").touch() for name in ("train", "val")],
            "has the folders train, val, which are no classes; give .*/data/train and .*/data/val instead",
        ),
        (lambda p: (p / "a").mkdir(parents=True), "has no usable image"),
        (
            lambda p: (p / "a").mkdir(parents=True) or (p / "a" / "x.jpg").touch(),
            r"first of 2 refused: .*x\.jpg: empty",
        ),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        build_index(tmp_path / "data")


@pytest.mark.parametrize("where", ["open", "read", "is_file"])
def test_a_disk_that_fails_leaves_out_no_image(
    where: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again; else the index would be of fewer images, and an evaluation of others than before."""
    shutil.copytree(digits / "val" / "0", tmp_path / "images" / "0")
    left = iter([True])  # the first call fails, once

    def fails(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, False):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr("pipeline.failures.backoff", lambda: itertools.repeat(0.01))
    place, name = (rows, "_header") if where == "read" else (Path, where)
    monkeypatch.setattr(place, name, fails(getattr(place, name)))
    index, report = build_index(tmp_path / "images")
    assert next(left, None) is None
    assert (len(index), report.refused) == (len(list((tmp_path / "images" / "0").iterdir())), [])


def test_an_index_that_cannot_be_read_is_not_called_another_file(
    digits_index: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("pipeline.data.index.pa.memory_map", fails)
    with pytest.raises(OSError, match="Stale file handle"):
        load_index(digits_index("val"))
    with pytest.raises(UserError, match=r"cannot be read: .*Stale file handle"):
        fetch_index(str(digits_index("val")))


def test_files_that_are_no_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_text("not arrow")
    with pytest.raises(UserError, match=r"x\.arrow is not an index file"):
        load_index(tmp_path / "x.arrow")
    with pytest.raises(UserError, match=r"no folder or index file .*none\.arrow"):
        load_index(tmp_path / "none.arrow")


def test_validation_classes_take_the_training_numbers(digits: Path, tmp_path: Path) -> None:
    index, _ = build_index(digits / "val")
    classes = ("a", *reversed(index.classes))
    relabelled = index.with_classes(classes)
    assert [classes[k] for k in relabelled.labels] == [index.classes[k] for k in index.labels]
    with pytest.raises(UserError, match="has class '9', which the training images do not have"):
        index.with_classes(tuple("012345678"))


def test_a_file_that_shrank_is_an_error_not_a_short_read(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x.jpg"
    file.write_bytes(next((digits / "val").glob("*/*.jpg")).read_bytes())
    index, _ = build_index(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"x\.jpg: \d+ bytes where the index has"):
        read(index, 0)


def write_images(root: Path, *files: str) -> None:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(encode(picture(8, 8, seed=number), "JPEG"))


def test_order_and_labels_are_torchvisions(tmp_path: Path) -> None:
    write_images(tmp_path, "a/b.jpg", "a/b/c.jpg", "a/a.jpg", "a-b/x.jpg", "a/b-/c.jpg", "B/x.jpg")
    index, _ = build_index(tmp_path)
    theirs = ImageFolder(tmp_path)
    assert list(index.classes) == theirs.classes
    samples = [(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in theirs.samples]
    assert list(zip(paths(index), index.labels.tolist(), strict=True)) == samples


def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a/x.jpg", "b/y.jpg")
    (tmp_path / "data" / "a" / "self").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "b")  # sorted before b, which must not vanish for it
    assert paths(build_index(tmp_path / "data")[0]) == ["a/x.jpg", "again/y.jpg", "b/y.jpg"]


def test_the_index_does_not_depend_on_how_the_work_is_cut(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = build_index(digits / "val")
    monkeypatch.setattr(find, "UNIT_IMAGES", 7)
    with ThreadPoolExecutor(3) as pool:
        cut, report = build_index(digits / "val", pool=pool, parts=tmp_path / "parts")
    assert (report.units, report.reused) == (52, 0)
    assert cut.fingerprint == whole.fingerprint
    assert paths(cut) == paths(whole)
    again, report = build_index(digits / "val", parts=tmp_path / "parts")
    assert (report.reused, again.fingerprint) == (52, whole.fingerprint)


def test_only_whole_unchanged_parts_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "UNIT_IMAGES", 1)
    data, parts = tmp_path / "data", tmp_path / "parts"
    write_images(data, "a/0.jpg", "a/1.jpg", "a/2.jpg")
    build_index(data, parts=parts)
    (data / "a" / "1.jpg").write_bytes(encode(picture(9, 9), "JPEG"))
    index, report = build_index(data, parts=parts)
    assert (report.reused, index.heights.tolist()) == (2, [8, 9, 8])
    for part in parts.iterdir():
        part.write_bytes(part.read_bytes()[:-20])
    again, report = build_index(data, parts=parts)
    assert (report.reused, again.fingerprint) == (0, index.fingerprint)


def test_an_index_without_some_rows_is_that_of_the_others(tmp_path: Path) -> None:
    write_images(tmp_path, "a/0.jpg", "a/1.jpg", "b/2.jpg", "b/3.jpg")
    index, _ = build_index(tmp_path)
    (tmp_path / "a" / "0.jpg").unlink()
    (tmp_path / "b" / "3.jpg").unlink()
    left = drop_rows(index, [0, 3])
    assert paths(left) == ["a/1.jpg", "b/2.jpg"]
    assert left.fingerprint == build_index(tmp_path)[0].fingerprint


def test_single_files_keep_their_names(tmp_path: Path) -> None:
    write_images(tmp_path, "a/0.jpg")
    index, refused = index_files([tmp_path / "a" / "0.jpg", tmp_path / "none.jpg", tmp_path / "a" / "0.jpg"])
    assert index is not None
    assert (len(index), index.full_path(0)) == (1, str(tmp_path / "a" / "0.jpg"))
    assert [str(one) for one in refused] == [f"{tmp_path}/none.jpg: no such file"]
    assert index_files([tmp_path / "none.jpg"])[0] is None


def test_a_mixture_of_kinds_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a/x.jpg")
    (tmp_path / "b.tar").touch()
    with pytest.raises(UserError, match=r"has images in class folders \(a/x\.jpg\) and tar shards \(b\.tar\)"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s4://bucket/data", "s4://bucket/data: .*; use a path"),
        ("s3://key:hush@bucket/data", "leave the login out of it"),
        ("/data/{a,b}/x.tar", "braces may be in the files' names alone"),
        ("/nowhere/train-{0..2}.tar", r"/nowhere/train-0\.tar does not exist; give a folder"),
        ("/nowhere/*.tar", r"/nowhere/\*\.tar does not exist; give a folder, a file, or several as DIR/train-"),
        ("/nowhere/train-{000..999999999}.tar", "stands for more than 100000 files"),
        ("", "the source of images is an empty text"),
        ("gs://", "gs:// names no bucket or server"),
    ],
)
def test_sources_that_cannot_be_opened_are_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_index(source)


def test_pipes_and_links_to_nowhere_are_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe\.tar is not a file"):
        build_index(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"lacks a file that should be there: .*pipe\.tar is not a file"):
        build_index(tmp_path)
    (tmp_path / "pipe.tar").unlink()
    (tmp_path / "lost.tar").symlink_to(tmp_path / "nowhere.tar")
    with pytest.raises(UserError, match=r"lacks a file that should be there: .*lost\.tar"):
        build_index(tmp_path)


def write_parquet(
    file: Path, images: Sequence[bytes | None], labels: Sequence[object], features: dict[str, object] | None = None
) -> None:
    """As Hugging Face's `datasets` does; with no features a plain table of binary images."""
    column = pa.array(images, pa.binary())
    if features:
        column = pa.array([{"bytes": data, "path": None} for data in images])
    table = pa.table({"other": [0] * len(images), "image" if not features else "picture": column, "label": labels})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=2)


HUGGING = {"picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    images = [encode(picture(10 + k, 20, seed=k), "JPEG") for k in range(5)]
    write_parquet(tmp_path / "data" / "1.parquet", [*images[:3], None, b"x"], [1, 0, -1, 1, 1], HUGGING)
    write_parquet(tmp_path / "data" / "2.parquet", images[3:], [0, 1], HUGGING)
    index, report = build_index(tmp_path)
    assert index.classes == ("cat", "dog")
    assert paths(index) == [f"data/{n}.parquet#row {k}" for n, k in ((1, 0), (1, 1), (2, 0), (2, 1))]
    assert index.labels.tolist() == [1, 0, 0, 1]
    assert index.heights.tolist() == [10, 11, 13, 14]
    assert [read(index, row) for row in range(4)] == [images[k] for k in (0, 1, 3, 4)]
    reasons = {one.path.removeprefix(f"{tmp_path}/data/1.parquet#row "): one.reason for one in report.refused}
    assert reasons == {
        "2": "label -1 is not a class number from 0 to 999999",
        "3": "no image's bytes in it",
        "4": "not an image in a known format",
    }


def test_plain_parquet_and_words_for_labels(tmp_path: Path) -> None:
    image = encode(picture(), "PNG")
    write_parquet(tmp_path / "x.parquet", [image] * 3, ["dog", "cat", None])
    index, report = build_index(tmp_path / "x.parquet")
    assert (index.classes, index.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert [one.reason for one in report.refused] == ["no label"]


def test_parquet_of_other_things_is_refused_as_a_whole_and_odd_metadata_ignored(tmp_path: Path) -> None:
    images = [encode(picture(10, 20), "JPEG")] * 2
    odd = {"picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": 3}}
    write_parquet(tmp_path / "a.parquet", images, [0, 1], odd)
    pq.write_table(pa.table({"image": ["x.jpg"], "label": [0]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": images}), tmp_path / "c.parquet")
    index, report = build_index(tmp_path)
    assert (len(index), index.classes) == (2, ("0", "1"))
    assert [str(one).removeprefix(f"{tmp_path}/") for one in report.refused] == [
        "b.parquet: its column image holds string, not the bytes of images",
        "c.parquet: no column of labels, named label or labels; it has image",
    ]


def test_damaged_parquet_costs_the_damaged_rows_alone(tmp_path: Path) -> None:
    images = [encode(picture(seed=k), "PNG") for k in range(6)]
    write_parquet(tmp_path / "x.parquet", images, [0, 1, 0, 1, 0, 1])
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    place = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(1).data_page_offset
    content[place : place + 40] = bytes(40)
    (tmp_path / "x.parquet").write_bytes(content)
    (tmp_path / "y.parquet").write_bytes(b"nothing")
    index, report = build_index(tmp_path)
    assert index.offsets.tolist() == [0, 1, 4, 5]
    assert "rows 2 to 3 cannot be read" in report.refused[0].reason
    assert "not a Parquet file" in report.refused[1].reason


def test_files_that_number_classes_differently_are_refused(tmp_path: Path) -> None:
    image = encode(picture(), "PNG")
    other = {**HUGGING, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    write_parquet(tmp_path / "1.parquet", [image], [0], HUGGING)
    write_parquet(tmp_path / "2.parquet", [image], [0], other)
    with pytest.raises(UserError, match=r"1\.parquet and 2\.parquet declare different classes"):
        build_index(tmp_path)


def test_images_and_parquet_on_s3(tmp_path: Path) -> None:
    write_images(tmp_path, "a/x.jpg", "b/nested/y.jpg", "b/.hidden.jpg", "b/void.jpg")
    (tmp_path / "b" / "void.jpg").write_bytes(b"")
    write_parquet(tmp_path / "x.parquet", [encode(picture(), "PNG")], [0], HUGGING)
    with s3_storage() as bucket:
        for file in ("a/x.jpg", "b/nested/y.jpg", "b/.hidden.jpg", "b/void.jpg"):
            (bucket / "images" / file).parent.upload(tmp_path / file, Path(file).name)
        (bucket / "tables").upload(tmp_path / "x.parquet", "x.parquet")
        index, report = build_index((bucket / "images").uri)
        assert (paths(index), index.classes) == (["a/x.jpg", "b/nested/y.jpg"], ("a", "b"))
        assert [one.reason for one in report.refused] == ["empty file"]
        index, _ = build_index((bucket / "tables").uri)
        assert paths(index) == ["x.parquet#row 0"]
        index.save(tmp_path / "i.arrow")
        (bucket / "tables").upload(tmp_path / "i.arrow", "i.arrow")
        assert open_index((bucket / "tables" / "i.arrow").uri)[0].fingerprint == index.fingerprint
        with pytest.raises(UserError, match=r"no index file s3:.*none\.arrow"):
            open_index((bucket / "tables" / "none.arrow").uri)


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "i.arrow"
    image = encode(picture(400, 400).convert("L"), "PNG")[:-12]  # not ending well, it is decoded: that takes a while
    for k in range(40):
        (data / "a").mkdir(parents=True, exist_ok=True)
        (data / "a" / f"{k:02}.png").write_bytes(image)
    program = (
        "import sys; from pipeline.cli import app; from pipeline.data.indexing import find; find.UNIT_IMAGES = 2; "
        "sys.exit(app.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "index", str(data), "--out", str(out), "--workers", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    parts = out.with_name("i.arrow.parts")
    while len(list(parts.glob("*.arrow"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    before = len(list(parts.glob("*.arrow")))
    assert 3 <= before < 20
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(again.stdout)
    assert result["parts"]["all"] == 20
    assert before <= result["parts"]["there_already"] <= before + 4  # what was in hand may still have been finished
    assert result["images"] == 40
    assert not parts.exists()
    assert result["fingerprint"] == build_index(data)[0].fingerprint


def test_verify_finds_what_only_decoding_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "data", "a/sound.jpg")
    others = {"damaged.jpg": damaged_jpeg(), "cmyk.jpg": encode(picture().convert("CMYK"), "JPEG"), **turned_images()}
    for name, content in others.items():
        (tmp_path / "data" / "a" / name).write_bytes(content)
    out = tmp_path / "i.arrow"
    command = ["index", str(tmp_path / "data"), "--out", str(out), "--workers", "1"]
    assert app.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9
    assert app.main([*command, "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    place = f"{tmp_path}/data/a"
    assert (result["images"], result["verified"]) == (8, True)
    assert [one["path"] for one in result["refused"]] == [f"{place}/damaged.jpg"]
    assert "cannot be decoded: " in result["refused"][0]["reason"]
    assert result["cmyk"] == [f"{place}/cmyk.jpg"]
    assert result["exif_rotated"] == [f"{place}/{name}" for name in sorted(turned_images()) if name != "xmp.jpg"]
    assert "a/damaged.jpg" not in paths(load_index(out))
    assert app.main(command) == 0
    text = capsys.readouterr().out
    assert "1 CMYK images, which DALI converts to RGB" in text
    assert "5 images with an EXIF orientation, which DALI applies" in text
