"""Packing: the same images with the same labels, as others read them, and the same bytes every time."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_index import read, write_images

from pipeline.cli import app
from pipeline.data.indexing.build import build_index
from pipeline.data.pack import pack
from pipeline.errors import UserError


def run_pack(source: Path, out: Path, **options: float) -> list[str]:
    settings = {"shard_mb": 256.0, "seed": 0, **options}
    return pack(
        build_index(source)[0],
        out,
        shard_mb=settings["shard_mb"],
        seed=int(settings["seed"]),
        progress=lambda *_: None,
        warn=lambda _: None,
    )


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_webdataset_library_reads_the_shards(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "val"
    shards = run_pack(digits / "val", out, shard_mb=0.3)
    assert shards[:2] == ["val-000000.tar", "val-000001.tar"]
    assert all((out / name).stat().st_size <= 300_000 for name in shards)
    program = (  # in a process of its own, since the library does not close its files
        "import json, sys, webdataset; shards = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode('rgb8');"
        "print(json.dumps([[s['__key__'], s['jpg'].shape, s['cls'], s['json']] for s in shards]))"
    )
    command = [sys.executable, "-c", program, *(str(out / name) for name in shards)]
    samples = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    classes = (out / "classes.txt").read_text().splitlines()
    assert [key for key, *_ in samples] == [f"{k:09}" for k in range(360)]
    for _, shape, label, about in samples:
        assert shape == [32, 32, 3]
        assert classes[label] == about["class"] == about["path"].split("/")[0]
        assert about["label"] == label
    assert len({about["path"] for *_, about in samples}) == 360


def test_an_index_of_the_shards_holds_the_same(digits: Path, tmp_path: Path) -> None:
    folder, _ = build_index(digits / "val")
    run_pack(digits / "val", tmp_path / "val", shard_mb=0.3)
    packed, report = build_index(tmp_path / "val")
    assert report.refused == []
    assert packed.classes == folder.classes
    assert np.array_equal(np.bincount(packed.labels), np.bincount(folder.labels))
    theirs = {read(folder, row): folder.labels[row] for row in range(360)}
    assert all(theirs[read(packed, row)] == packed.labels[row] for row in range(0, 360, 7))
    assert (np.diff(packed.labels) != 0).mean() > 0.8  # shuffled: neighbours are of different classes


def test_the_same_bytes_every_time_and_others_for_another_seed(tmp_path: Path) -> None:
    write_images(tmp_path / "data", *(f"{name}/{k}.jpg" for name in "ab" for k in range(20)))
    run_pack(tmp_path / "data", tmp_path / "x" / "set", shard_mb=0.02)
    run_pack(tmp_path / "data", tmp_path / "y" / "set", shard_mb=0.02)
    run_pack(tmp_path / "data", tmp_path / "z" / "set", shard_mb=0.02, seed=1)
    first = digests(tmp_path / "x" / "set")
    assert len(first) > 3
    assert digests(tmp_path / "y" / "set") == first
    assert digests(tmp_path / "z" / "set")["set-000000.tar"] != first["set-000000.tar"]


def test_a_pack_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a/0.jpg", "a/1.jpg")
    index, _ = build_index(tmp_path / "data")
    (tmp_path / "data" / "a" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot pack .*/data into .*/set: .*1\.jpg"):
        pack(index, tmp_path / "set", shard_mb=1, seed=0, progress=lambda *_: None, warn=lambda _: None)
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a/0.jpg")
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"set exists; name a new folder, or remove it"):
        run_pack(tmp_path / "data", tmp_path / "set")


def test_a_class_name_that_is_no_line_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a\nb/0.jpg")
    with pytest.raises(UserError, match=r"the class name 'a\\nb' does not fit on a line"):
        run_pack(tmp_path / "data", tmp_path / "set")


def test_the_command_packs_a_folder_or_its_index(
    tmp_path: Path, digits: Path, digits_index: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for out, source in (("x/val", digits / "val"), ("y/val", digits_index("val"))):
        assert app.main(["pack", str(source), "--out", str(tmp_path / out), "--shard-mb", "2", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["images"], result["shards"], result["refused"]) == (360, ["val-000000.tar"], [])
    assert digests(tmp_path / "x" / "val") == digests(tmp_path / "y" / "val")
    assert app.main(["pack", str(digits / "val"), "--out", str(tmp_path / "x" / "val")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
