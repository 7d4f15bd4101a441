"""Images that break after the index was made: in any batch and any place another takes theirs, and they are named once.

DALI 2.4 would end the process for some of them, so each case has one of its own.
"""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ENVIRON, PIPELINE
from odd_images import damaged_jpeg, encode, picture
from ranks import no_bad_image

from pipeline.cluster.connection import last_line
from pipeline.config.data import DataConfig
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.fetch import MEAN_COLOUR, UnparsableError, refuse_unparsable
from pipeline.data.loading.graph import Graph
from pipeline.data.loading.loader import Batch, EvalLoader, LoaderContext, TrainLoader
from pipeline.data.verify import verify

CPU = torch.device("cpu")
WHOLE = encode(picture(48, 64), "JPEG", quality=85)
DAMAGES: dict[str, bytes | None] = {
    "deleted": None,
    "empty": b"",
    "garbage": np.random.default_rng(0).bytes(3000),
    "cut in its header": WHOLE[:100],
    "cut in its middle": WHOLE[: len(WHOLE) // 2],
    "zeroed header": bytes(200) + WHOLE[200:],
    "half zeros": WHOLE[: len(WHOLE) // 2] + bytes(len(WHOLE) - len(WHOLE) // 2),
    "zeroed tables": damaged_jpeg(),
}
OVER = "Current pipeline object is no longer valid."  # DALI's last words
UNPARSABLE = ("empty", "garbage", "cut in its header", "zeroed header")
PARTLY_DECODED = ("cut in its middle", "half zeros")  # libjpeg-turbo makes something of what there is


def write(folder: Path, number: int) -> Path:
    (folder / "a").mkdir(parents=True)
    for i in range(number):
        (folder / "a" / f"{i:03d}.jpg").write_bytes(WHOLE)
    return folder


def check(folder: Path, how: str, batch: int, num_places: int, num_threads: int) -> None:
    """Damage one image in each of so many batches, at another place in each, in every way."""
    places = np.linspace(0, batch - 1, num_places, dtype=int).tolist()
    index, _ = build_index(write(folder, batch * len(places)))
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, max_bad_fraction=0.1)
    here = LoaderContext(0, 1, CPU, num_threads)
    named: list[str] = []

    def on_bad(path: str, _: str) -> None:
        named.append(path)

    def loaded() -> list[Batch]:
        if how == "train":
            with closing(TrainLoader(index, cfg, here, on_bad, global_batch=batch, seed=0)) as train:
                return list(train.from_step(0, len(places)))
        with closing(EvalLoader(index, cfg, here, on_bad, batch=batch)) as val:
            return [pixels for _, pixels in val]

    damaged = {int(images.rows[place]) for place, images in zip(places, loaded(), strict=True)}
    files = {row: folder / index.path(row) for row in damaged}
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1)
    for damage, content in DAMAGES.items():
        for file in files.values():
            file.unlink() if content is None else file.write_bytes(content)
        named.clear()
        pairs = [pair for images in loaded() for pair in zip(images.images, images.rows, strict=True)]
        replaced = {int(row) for image, row in pairs if (image == colour).all()}
        assert sorted(named) == sorted(str(files[row]) for row in replaced), damage
        assert replaced <= damaged if damage in PARTLY_DECODED else replaced == damaged, damage
        for file in files.values():
            file.write_bytes(WHOLE)


def check_verify(folder: Path) -> None:
    """As `pipeline index --verify` does it, with one image of each kind in 300."""
    index, report = build_index(write(folder, 300))
    for i, content in enumerate(DAMAGES.values()):
        file = folder / "a" / f"{37 * i:03d}.jpg"
        file.unlink() if content is None else file.write_bytes(content)
    kept, after = verify(index, report, lambda *_: None)
    must = [37 * i for i, damage in enumerate(DAMAGES) if damage not in PARTLY_DECODED]
    refused = [int(Path(one.path).stem) for one in after.refused]
    assert set(must) <= set(refused) <= {37 * i for i in range(len(DAMAGES))}
    assert len(kept) == 300 - len(refused)


def in_process(code: str) -> None:
    words = [sys.executable, "-c", f"from pathlib import Path; import test_broken; test_broken.{code}"]
    done = subprocess.run(
        words,
        cwd=Path(__file__).parent,
        env=ENVIRON,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


IN_BETWEEN = (pytest.mark.e2e, pytest.mark.thorough)


@pytest.mark.parametrize("how", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("batch", "num_places", "num_threads"),
    [(32, 32, 1), pytest.param(64, 64, 4, marks=IN_BETWEEN), (256, 8, 16)],
)
def test_a_broken_image_ends_no_batch(how: str, batch: int, num_places: int, num_threads: int, tmp_path: Path) -> None:
    in_process(f"check(Path({str(tmp_path)!r}), {how!r}, {batch}, {num_places}, {num_threads})")


def test_a_whole_index_is_verified_whatever_is_broken(tmp_path: Path) -> None:
    in_process(f"check_verify(Path({str(tmp_path)!r}))")


@pytest.mark.parametrize("damage", UNPARSABLE)
def test_what_dali_does_not_parse_is_told_apart(damage: str) -> None:
    with pytest.raises(UnparsableError, match="its header is damaged, or it is of no known format"):
        refuse_unparsable(DAMAGES[damage] or b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_what_dali_reads_is_not_refused(kind: str) -> None:
    refuse_unparsable(encode(picture(), kind))


def test_predict_names_broken_images_and_answers_for_all_others(trained: dict[str, Any], tmp_path: Path) -> None:
    """Images of anyone, in a large batch: exit code 2 and a line for each broken one, never a crash."""
    images = sorted((write(tmp_path / "images", 64) / "a").iterdir())
    broken = dict(zip(images[3::8], DAMAGES.items(), strict=True))
    for file, (_, content) in broken.items():
        file.unlink() if content is None else file.write_bytes(content)
    words = [PIPELINE, "predict", trained["run_dir"], *map(str, images)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    named = [Path(line.split(":")[0]) for line in done.stderr.splitlines()]
    answered = [Path(line.split()[0]) for line in done.stdout.splitlines()]
    assert sorted([*named, *answered]) == images
    assert {file for file, (damage, _) in broken.items() if damage not in PARTLY_DECODED} <= set(named) <= set(broken)


def disturb(monkeypatch: pytest.MonkeyPatch, error: str, times: int) -> None:
    """Have so many runs of a graph fail."""
    run, left = Graph.run, [times]

    def fails(graph: Graph[Any], *stream: Any) -> Any:
        found = run(graph, *stream)
        if left[0] > 0:
            left[0] -= 1
            graph.in_flight.appendleft(found[0])
            raise RuntimeError(
                f"Error in GPU operator `decoders.image_slice`,\nencountered:\n\n{error}\n{OVER}\n{OVER}"
            )
        return found

    monkeypatch.setattr(Graph, "run", fails)


def decode_four(folder: Path) -> list[Batch]:
    index, _ = build_index(write(folder, 4))
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, max_bad_fraction=0.9)
    with closing(EvalLoader(index, cfg, LoaderContext(0, 1, CPU, 1), no_bad_image, batch=4)) as loader:
        return [batch for _, batch in loader]


@pytest.mark.parametrize("error", ["Can't allocate 3145728 bytes on device 0.", "Failed to decode sample #0 : "])
def test_a_device_in_trouble_breaks_no_image(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's words for a full card, and what a decoder leaves of them: nothing grey is trained on."""
    disturb(monkeypatch, error, times=10**6)
    with pytest.raises(RuntimeError) as e:
        decode_four(tmp_path)
    reason = error.removeprefix("Failed to decode sample #0 : ") or "it cannot be decoded"
    told = f"{tmp_path}/a/000.jpg: neither this nor a sound image of its size can be decoded: {reason}"
    assert last_line(e.value) == told.rstrip(".")


def test_a_device_in_trouble_for_a_moment_breaks_none_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch, its first half and its first image cannot be decoded; a sound image can, and then that one."""
    calm = decode_four(tmp_path / "calm")
    disturb(monkeypatch, "Can't allocate 3145728 bytes on device 0.", times=4)
    (found,) = decode_four(tmp_path / "disturbed")
    assert torch.equal(found.images, calm[0].images)


def test_an_image_that_became_smaller_is_a_broken_one(tmp_path: Path) -> None:
    """As large a file as before, but less in it than the index says."""
    index, _ = build_index(write(tmp_path, 3))
    small = encode(picture(20, 20), "JPEG", quality=85)
    (tmp_path / "a" / "001.jpg").write_bytes(small + bytes(len(WHOLE) - len(small)))
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, max_bad_fraction=0.9)
    named: list[tuple[str, str]] = []
    with closing(EvalLoader(index, cfg, LoaderContext(0, 1, CPU, 1), lambda *bad: named.append(bad), batch=3)) as val:
        assert [len(batch.images) for _, batch in val] == [3]
    assert [Path(path).name for path, _ in named] == ["001.jpg"]
    assert "not valid for image dimensions [20 x 20]" in named[0][1]
