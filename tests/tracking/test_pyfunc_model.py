"""The model in MLflow: sees images as the checkpoint does, survives what a stranger sends, is registered once."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib import request

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from commands import BIN, Run, Start
from odd_images import as_text, damaged_jpeg, encode, picture, write_odd_folder
from PIL import Image
from s3 import free_port
from servers import MlflowServer
from web import web_server

from pipeline.config.data import DataConfig
from pipeline.data.indexing.build import index_files
from pipeline.data.indexing.rows import DECODABLE
from pipeline.data.loading.loader import EvalLoader, LoaderContext
from pipeline.models import export, pretrained
from pipeline.storage import Storage
from pipeline.tracking import pyfunc_model
from pipeline.tracking.mlflow_logger import TARGET
from pipeline.tracking.mlflow_run import MlflowRun, Target
from pipeline.tracking.records import Model
from pipeline.training import inference


@pytest.fixture(scope="module")
def model(trained: dict[str, Any]) -> Any:
    mlflow.set_tracking_uri(trained["mlflow_uri"])
    return mlflow.pyfunc.load_model("models:/digits/1")


def test_constants_are_those_of_the_package() -> None:
    """The file imports nothing of the package, so it cannot take them from there."""
    assert export.NOTES == pyfunc_model.NOTES
    assert {*pyfunc_model.FORMATS, "MPO"} == set(DECODABLE)  # PIL opens MPO as JPEG


def test_the_whole_validation_set_is_classified_as_by_the_checkpoint(
    model: Any, trained: dict[str, Any], digits: Path
) -> None:
    """With images as text, decoded by PIL, beside DALI's pixels: top-1 the same, probabilities within 1e-4."""
    files = sorted((digits / "val").glob("*/*.jpg"))
    answers = model.predict(pd.DataFrame({"image": [as_text(file.read_bytes()) for file in files]}))
    network, cfg, classes = pretrained.load_model(Storage(trained["checkpoint"]))
    images, _ = inference.some_images(cfg, len(files))
    with torch.inference_mode():
        expected = network(images).softmax(1).topk(5)
    assert len(answers) == len(images) == 360
    assert answers["error"].tolist() == [""] * 360
    assert answers["class"].tolist() == [classes[k] for k in expected.indices[:, 0]]
    np.testing.assert_allclose(answers["probabilities"].tolist(), expected.values, rtol=0, atol=1e-4)
    assert [names[0] for names in answers["classes"]] == answers["class"].tolist()
    right = sum(name == file.parent.name for name, file in zip(answers["class"], files, strict=True))
    assert right / 360 == pytest.approx(trained["top1"], abs=0.01)  # the training may have evaluated in bf16


def write_odd_images(folder: Path) -> list[Path]:
    """Images of every kind that can be trained on, turned in every way."""
    usable, _ = write_odd_folder(folder / "x")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[pyfunc_model.ORIENTATION] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            (folder / f"{orientation}.{kind}").write_bytes(encode(picture(61, 83, orientation), kind, exif=exif))
        tags = {pyfunc_model.ORIENTATION: orientation}
        (folder / f"{orientation}.TIFF").write_bytes(encode(picture(61, 83, orientation), "TIFF", tiffinfo=tags))
    deep = np.random.default_rng(0).integers(0, 65536, (60, 80), dtype=np.uint16)
    (folder / "deep.png").write_bytes(encode(Image.fromarray(deep), "PNG"))
    (folder / "deep.pgm").write_bytes(b"P5 80 60 65535\n" + deep.astype(">u2").tobytes())
    (folder / "grey_alpha.png").write_bytes(encode(picture().convert("LA"), "PNG"))
    (folder / "palette_alpha.png").write_bytes(encode(picture().quantize(16), "PNG", transparency=bytes(range(16))))
    (folder / "j.jp2").write_bytes(encode(picture(), "JPEG2000"))
    (folder / "noise.jpg").write_bytes(encode(Image.fromarray(deep.astype(np.uint8)).convert("RGB"), "JPEG"))
    return [*(folder / "x" / name for name in usable), *(file for file in folder.iterdir() if file.is_file())]


def test_odd_images_are_seen_as_the_evaluation_sees_them(tmp_path: Path) -> None:
    files = write_odd_images(tmp_path)
    index, refused = index_files(files)
    assert index is not None
    assert refused == []
    cfg = DataConfig(train="-", val="-", image_size=40, val_resize=48)
    loader = EvalLoader(
        index, cfg, LoaderContext.here(), lambda path, reason: pytest.fail(f"{path}: {reason}"), batch=len(files)
    )
    ((_, batch),) = loader
    loader.close()
    for row, expected in zip(batch.rows, batch.images, strict=True):
        path = Path(index.path(int(row)))
        found = pyfunc_model.to_pixels(path.read_bytes(), 40, 48)
        assert (found.int() - expected.int()).abs().max() <= 1, path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", "not an image in a known format"),
        (b"", "not an image in a known format"),
        (encode(picture(), "JPEG")[:900], "not a readable image (image file is truncated"),
        (encode(picture().convert("P"), "GIF"), "not an image in a known format"),
        (encode(picture().convert("F"), "TIFF"), "floating-point"),
        (encode(Image.new("1", (9200, 9200)), "PNG"), "9200 x 9200 is more than 80 million pixels"),
        (encode(Image.new("1", (30_000, 30_000)), "PNG"), "decompression bomb"),
    ],
    ids=["text", "empty", "cut off", "GIF", "floats", "large", "bomb"],
)
def test_what_cannot_be_decoded_is_told(data: bytes, message: str) -> None:
    with pytest.raises(pyfunc_model.ImageError) as refused:
        pyfunc_model.to_pixels(data, 32, 32)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no image"),
        (None, "no image"),
        (7, "no image"),
        ("not base64!", "neither base64"),
        ("größe", "neither base64"),
        ("file:///etc/passwd", "a URL of file:// is not fetched"),
        ("ftp://127.0.0.1/x.png", "a URL of ftp:// is not fetched"),
        ("http://[/x.png", "not fetched"),
        ("http://127.0.0.1:1/x.png", "not fetched"),
        ("http://127.0.0.1:99999/x.png", "not fetched"),
    ],
)
def test_what_is_no_image_is_told(text: object, message: str) -> None:
    with pytest.raises(pyfunc_model.ImageError, match=message):
        pyfunc_model.to_bytes(text)


def test_base64_may_be_broken_into_lines_or_be_a_data_uri() -> None:
    data = encode(picture(), "PNG")
    text = as_text(data)
    lines = "\n".join(text[k : k + 76] for k in range(0, len(text), 76))
    for one in (text, lines, f" {text}\n", f"data:image/png;base64,{text}", f"DATA:image/png;base64,{lines}"):
        assert pyfunc_model.to_bytes(one) == data


class Unhelpful(BaseHTTPRequestHandler):
    """Sends whoever asks for /URL on to that URL; /trickle gets a byte now and then, without end."""

    def do_GET(self) -> None:
        if self.path != "/trickle":
            self.send_response(302)
            self.send_header("Location", self.path[1:])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):  # the other side hangs up
            while True:
                self.wfile.write(b".")
                time.sleep(0.1)

    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr."""


@pytest.fixture
def unhelpful() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Unhelpful) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_fetched_within_limits(tmp_path: Path, unhelpful: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.png").write_bytes(encode(picture(), "PNG"))
    (tmp_path / "large.png").write_bytes(bytes(2 * 2**20))
    monkeypatch.setattr(pyfunc_model, "MAX_MB", 1)
    monkeypatch.setattr(pyfunc_model, "FETCH_S", 0.5)
    with web_server(tmp_path) as server:
        place = server.storage.uri
        for url in (f"{place}/good.png", f"{unhelpful}/{place}/good.png"):
            assert pyfunc_model.to_bytes(url) == (tmp_path / "good.png").read_bytes()
        wrong = {
            f"{place}/none.png": "not fetched: HTTP 404",
            f"{place}/large.png": "larger than 1 MB",
            f"{unhelpful}/trickle": "not fetched within",
            f"{unhelpful}/file://{tmp_path}/good.png": "not fetched: HTTP 302",
            f"{unhelpful}/ftp://127.0.0.1/good.png": "not fetched: <urlopen error unknown url type: ftp>",
            "A" * 2 * 2**20: "larger than 1 MB",
        }
        for url, message in wrong.items():
            with pytest.raises(pyfunc_model.ImageError, match=message):
                pyfunc_model.to_bytes(url)


def test_it_loads_and_answers_without_this_package(trained: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    """In a process where the package cannot be imported; one bad row leaves the others alone."""
    image = as_text(next((digits / "val" / "3").glob("*.jpg")).read_bytes())
    program = f"""
import json, sys
sys.modules["pipeline"] = None
import mlflow, pandas
mlflow.set_tracking_uri({trained["mlflow_uri"]!r})
model = mlflow.pyfunc.load_model("models:/digits/1")
example = model.input_example
rows = pandas.concat([example, pandas.DataFrame({{"image": ["broken", sys.argv[1]]}})])
print(json.dumps(model.predict(rows).to_dict("records"), allow_nan=False))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, image], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    example, broken, good = json.loads(done.stdout)
    assert (example["error"], good["error"]) == ("", "")
    assert len(good["classes"]) == len(good["probabilities"]) == 5
    assert broken == {
        "class": None,
        "probability": None,
        "classes": [],
        "probabilities": [],
        "error": "neither base64 of an encoded image nor an http(s) URL",
    }


def test_a_training_registers_its_model_once(
    run: Run, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where MLflow is sent the record again; on demand the same model gets further names, and no second copy."""
    client, run_id = mlflow.MlflowClient(trained["mlflow_uri"]), trained["mlflow_run_id"]
    (version,) = client.search_model_versions("name = 'digits'")
    assert (version.version, version.run_id) == (1, run_id)
    assert version.tags == {
        "pipeline.checkpoint": "step_00000066",
        "pipeline.run_dir": trained["run_dir"],
        "pipeline.top1": f"{trained['top1']:.6f}",
    }
    target = Target(**json.loads((Path(trained["run_dir"]) / "mlflow" / TARGET).read_text()))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):  # by one process: MLflow sets the variable for a new store only
        MlflowRun(target).send([Model(Path(trained["checkpoint"]).name, "digits")])
        assert "MLFLOW_TRACKING_URI" not in os.environ
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/elsewhere.db")  # the process's own: a new process has another one
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which that sets, too
    code, out, _ = run("register", trained["run_dir"], "digits")
    assert code == 0
    assert out.startswith(f"models:/digits/1 is {trained['checkpoint']}\n")
    assert f"MLFLOW_TRACKING_URI={trained['mlflow_uri']} mlflow models serve -m models:/digits/1 " in out
    assert json.loads(run("register", trained["run_dir"], "other", "--json")[1])["model"] == "models:/other/1"
    assert len(client.search_model_versions("name = 'digits'")) == 1
    (logged,) = client.search_logged_models([trained["mlflow_experiment_id"]], f"source_run_id = '{run_id}'")
    assert logged.tags["pipeline.checkpoint"] == "step_00000066"
    older = Path(trained["run_dir"]) / "checkpoints" / "step_00000040"
    assert json.loads(run("register", older, "digits", "--json")[1])["version"] == 2
    info = client.get_run(run_id).info
    assert info.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_a_copied_storage_is_registered_in_the_copy(trained: dict[str, Any], tmp_path: Path) -> None:
    """MLflow's store there has the old paths of its artifacts. By a process of its own, as MLflow remembers them."""
    run, copy = Path(trained["run_dir"]), tmp_path / "copy"
    shutil.copytree(run.parent, copy)

    def files(storage: Path) -> set[str]:
        return {str(path.relative_to(storage)) for path in (storage / "mlartifacts").rglob("*")}

    before = files(run.parent)
    assert before, "or this shows nothing"
    older = copy / run.name / "checkpoints" / "step_00000040"
    command = [str(BIN / "pipeline"), "register", str(older), "copied", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "models:/copied/1"
    assert files(run.parent) == before
    assert files(copy) >= before
    with closing(sqlite3.connect(copy / "mlflow.db")) as store:
        places = [place for (place,) in store.execute("SELECT artifact_location FROM logged_models")]
    assert places
    assert all(place.startswith(f"{copy}/mlartifacts/") for place in places), places


def test_what_cannot_be_registered_gets_one_line(run: Run, trained: dict[str, Any], tmp_path: Path) -> None:
    code, out, err = run("register", trained["run_dir"], "a/b")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mlflow.register=a/b: must be a name without" in err
    copy = tmp_path / "copy"
    shutil.copytree(trained["checkpoint"], copy)
    code, out, err = run("register", copy, "digits")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{copy}: lies in no run's folder" in err
    code, out, err = run("register", trained["run_dir"], "digits", "--mlflow-uri", f"http://127.0.0.1:{free_port()}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "does not take the model" in err


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_server_that_does_not_know_the_training_takes_its_model(
    run: Run, trained: dict[str, Any], tmp_path: Path
) -> None:
    """As where a run of a laptop is handed to a team; and stdout has one JSON object, whatever MLflow says."""
    with MlflowServer(tmp_path, free_port()) as server:
        server.start()
        code, out, _ = run("register", trained["run_dir"], "digits", "--mlflow-uri", server.uri, "--json")
        assert (code, json.loads(out)["model"]) == (0, "models:/digits/1")
        client = mlflow.MlflowClient(server.uri)
        (version,) = client.search_model_versions("name = 'digits'")
        assert client.get_run(version.run_id).info.status == "FINISHED"


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_mlflow_serves_it_over_http(trained: dict[str, Any], digits: Path, start: Start) -> None:
    """One request with base64, a URL, and a broken image, to `mlflow models serve` as docs/serving.md has it."""
    port, environment = free_port(), {"MLFLOW_TRACKING_URI": trained["mlflow_uri"]}
    command = [str(BIN / "mlflow"), "models", "serve", "-m", "models:/digits/1", "--env-manager", "local"]
    environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
    server = start([*command, "--port", str(port)], environment)
    server.wait_for("Uvicorn running on")
    image = next((digits / "val" / "3").glob("*.jpg"))
    broken = as_text(damaged_jpeg())
    with web_server(digits) as web:
        url = f"{web.storage.uri}/{image.relative_to(digits)}"
        texts = [as_text(image.read_bytes()), broken, url, f"{url}.none"]
        body = json.dumps({"dataframe_records": [{"image": text} for text in texts]}).encode()
        asked = request.Request(
            f"http://127.0.0.1:{port}/invocations", body, headers={"Content-Type": "application/json"}
        )
        with request.urlopen(asked, timeout=60) as answer:
            text = answer.read().decode()
    assert "NaN" not in text  # which is no JSON
    encoded, damaged, fetched, missing = json.loads(text)["predictions"]
    assert encoded == fetched
    assert encoded["error"] == ""
    assert encoded["class"] == encoded["classes"][0]
    assert damaged["error"].startswith("not a readable image")
    assert missing["error"] == "not fetched: HTTP 404"
    assert damaged["class"] is missing["class"] is None
